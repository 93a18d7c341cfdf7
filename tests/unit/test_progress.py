"""Adaptation that goes on where it was: the same bits, whenever it was killed."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
from pathlib import Path

import pytest
import torch
from helpers import copied, same_state, upcycled_toy
from killed import BELONGS_TO, adapted, go_on

from fusion_merge import sealed
from fusion_merge.adaptation.guard import CollapseGuard
from fusion_merge.adaptation.progress import Progress
from fusion_merge.adaptation.runtime import make_fabric
from fusion_merge.errors import AdaptationError, CheckpointError, FusionMergeError
from fusion_merge.moe import Routing


def _progress(tmp_path: Path, *, every: int = 1, resume: bool = False, **belongs_to: object) -> Progress:
    return Progress(tmp_path / "state", BELONGS_TO | belongs_to, every, resume=resume)


def _state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return copied({n: p for n, p in model.named_parameters() if ".router." in n})


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("stop", [1, 5, 8])
def test_a_resumed_adaptation_ends_in_the_same_bits(tmp_path, optimizer, stop):
    whole, expected = adapted(None, 8, optimizer=optimizer)
    adapted(_progress(tmp_path), stop, optimizer=optimizer)
    resumed, record = adapted(_progress(tmp_path, resume=True), 8, optimizer=optimizer)
    assert same_state(_state(resumed), _state(whole))
    assert (record.steps, record.losses, record.collapsed) == (8, expected.losses, expected.collapsed)


def test_keeping_progress_changes_nothing(tmp_path):
    assert same_state(_state(adapted(_progress(tmp_path), 6)[0]), _state(adapted(None, 6)[0]))


def test_the_state_is_saved_every_so_often_and_at_the_end(tmp_path, monkeypatch):
    steps = []
    save = Progress.save
    monkeypatch.setattr(Progress, "save", lambda self, record, *a: (steps.append(record.steps), save(self, record, *a)))
    adapted(_progress(tmp_path, every=3), 7)
    assert steps == [3, 6, 7]


def test_where_there_is_other_progress_alone_it_is_said_what_differs(tmp_path, caplog):
    how = {"lr": 0.1, "objective": "entropy"}
    for number, (name, lr) in enumerate((("toy-0", 0.3), ("toy-1", 0.1), ("toy-3", 0.4))):
        adapted(Progress(tmp_path / f"{name}.progress", how | {"lr": lr}, 1), 2)
        os.utime(tmp_path / f"{name}.progress", (0, 5 - abs(number - 1)))  # so that the one in the middle is the newest
    with caplog.at_level("INFO"):
        Progress(tmp_path / "toy-2.progress", how | {"lr": 0.2}, 1, resume=True)
        Progress(tmp_path / "other-2.progress", how, 1, resume=True)
    first, second = caplog.messages[-2:]
    assert "toy-2.progress: starting from the first step; " in first
    assert first.endswith(f"`{tmp_path / 'toy-1.progress'}` does not fit: `lr` is 0.1 there and 0.2 here")
    assert second.endswith("other-2.progress: starting from the first step")


def test_progress_that_is_not_wanted_is_replaced(tmp_path):
    adapted(_progress(tmp_path), 4)
    _, record = adapted(_progress(tmp_path), 2)
    assert record.steps == len(record.losses["cats"]) == 2
    assert _progress(tmp_path, resume=True).step == 2


def test_without_a_file_the_first_step_comes_first(tmp_path, caplog):
    caplog.set_level("INFO")
    assert _progress(tmp_path, resume=True).step == 0
    assert "starting from the first step" in caplog.text


def test_a_collapse_is_remembered(caplog):
    first, second = CollapseGuard({"cats": 4}), CollapseGuard({"cats": 4})
    for step in range(12):
        first.update(step, "cats", torch.arange(16) % 4 if step == 0 else torch.full((16,), 2))
    assert first.collapsed == {"cats": 1}
    second.restore(json.loads(json.dumps(first.state())))
    caplog.clear()
    batch = torch.full((16,), 2)
    assert second.update(12, "cats", batch) == first.update(12, "cats", batch)
    assert second.state() == first.state()
    assert not caplog.messages  # it was told of before


def test_progress_of_another_adaptation_is_refused(tmp_path):
    adapted(_progress(tmp_path, lr=0.1), 2)
    with pytest.raises(CheckpointError, match=r"does not fit: `lr` is 0\.1 there and 0\.2 here"):
        _progress(tmp_path, resume=True, lr=0.2)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, keep):
    adapted(_progress(tmp_path), 2)
    content = (tmp_path / "state").read_bytes()
    (tmp_path / "state").write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    with pytest.raises(CheckpointError, match="cannot read adaptation progress"):
        _progress(tmp_path, resume=True)


def test_a_flipped_bit_is_refused(tmp_path):
    adapted(_progress(tmp_path), 2)
    content = bytearray((tmp_path / "state").read_bytes())
    content[-5] ^= 1
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        adapted(_progress(tmp_path, resume=True), 4)


def test_a_full_disk_ends_adaptation_and_leaves_the_earlier_state(tmp_path, monkeypatch):
    adapted(_progress(tmp_path), 2)
    before = (tmp_path / "state").read_bytes()

    def full(_tensors, path, **_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(sealed, "save_file", full)
        with pytest.raises(FusionMergeError, match="state`: No space left on device"):
            adapted(_progress(tmp_path, resume=True), 4)
    assert (tmp_path / "state").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state"]
    resumed, _ = adapted(_progress(tmp_path, resume=True), 4)
    assert same_state(_state(resumed), _state(adapted(None, 4)[0]))


def test_mixed_precision_is_resumed_too(tmp_path):
    def fabric():
        return make_fabric(accelerator="cpu", precision="bf16-mixed")

    whole, _ = adapted(None, 6, fabric=fabric())
    adapted(_progress(tmp_path), 3, fabric=fabric())
    resumed, _ = adapted(_progress(tmp_path, resume=True), 6, fabric=fabric())
    assert same_state(_state(resumed), _state(whole))


def test_killed_at_twenty_random_moments_it_ends_in_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # for the server that children are forked from
    steps, kills = 600, 0
    draw = random.Random(0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed"])
    file = tmp_path / "state"
    reached = [0]
    while kills < 20:
        started = context.Event()
        child = context.Process(target=go_on, args=(file, steps, started))
        child.start()
        if kills % 5:  # the others die before they have begun
            started.wait()
        child.join(draw.uniform(0.0, 0.3))
        if child.is_alive():
            child.kill()
            kills += 1
        child.join()
        reached.append(Progress(file, BELONGS_TO, 1, resume=True).step)  # it can be read after every kill
        assert reached[-1] >= reached[-2]
        if child.exitcode == 0:
            break
    assert kills == 20
    assert 0 < reached[-1] < steps
    resumed, _ = adapted(Progress(file, BELONGS_TO, 100, resume=True), steps)
    assert same_state(_state(resumed), _state(adapted(None, steps)[0]))


def test_the_last_good_routers_are_known_after_a_resume_too(tmp_path):
    adapted(_progress(tmp_path), 3)
    model = upcycled_toy(routing=Routing.BATCH)
    with pytest.raises(AdaptationError, match="is nan at step 3"):
        adapted(_progress(tmp_path, resume=True), 5, model=model, broken_at=3)
    assert same_state(_state(model), _state(adapted(None, 2)[0]))
