"""Router checkpoints."""

from __future__ import annotations

import json
import os

import pytest
import torch
from helpers import copied, same_state, upcycled_toy
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from fusion_merge import sealed
from fusion_merge.adaptation.checkpoint import load_trained, router_state, save_trained
from fusion_merge.errors import CheckpointError, FusionMergeError
from fusion_merge.moe import LayerEncodedRouter, make_router, moe_layers

BELONGS_TO = {
    "method": "wemoe",
    "options": {"init_lambda": 0.3, "router_hidden_layers": 2},
    "tasks": ["cats", "dogs"],
    "fingerprints": {"_pretrained_": "ab", "cats": "cd", "dogs": "ef"},
}


@pytest.fixture
def model():
    return upcycled_toy(depth=2)


@pytest.fixture
def saved(model, tmp_path):
    save_trained(tmp_path / "routers.ckpt", router_state(model), BELONGS_TO)
    return tmp_path / "routers.ckpt"


def _other(model=None):
    """The same model with other routers."""
    other = model or upcycled_toy(depth=2)
    for parameter in router_state(other).values():
        parameter.data += 1
    return other


def _refused(path, match: str, belongs_to=BELONGS_TO, model=None) -> None:
    """Check that a checkpoint is refused and leaves the model alone."""
    model = model or _other()
    before = copied(model.state_dict())
    with pytest.raises(CheckpointError, match=match):
        load_trained(path, router_state(model), belongs_to)
    assert same_state(model.state_dict(), before)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_saved_routers_are_read_back_bit_for_bit(tmp_path, depth, shared):
    model = upcycled_toy(depth=depth, shared=shared)
    save_trained(tmp_path / "routers.ckpt", router_state(model), BELONGS_TO)
    other = _other(upcycled_toy(depth=depth, shared=shared))
    load_trained(tmp_path / "routers.ckpt", router_state(other), BELONGS_TO)
    assert same_state(other.state_dict(), model.state_dict())


def test_nothing_but_routers_is_stored(saved):
    expected = {f"layers.{i}.{part}.{t}" for i in range(2) for part in ("inner", "out") for t in ("weight", "bias")}
    assert set(load_file(saved)) == expected


def test_reading_changes_nothing_but_routers(saved):
    other = _other()
    other.layers[0].fc1.experts.weight.data += 1
    experts = other.layers[0].fc1.experts.weight.detach().clone()
    load_trained(saved, router_state(other), BELONGS_TO)
    assert torch.equal(other.layers[0].fc1.experts.weight, experts)


def test_read_routers_can_be_trained(saved):
    other = _other()
    load_trained(saved, router_state(other), BELONGS_TO)
    assert all(p.requires_grad for p in router_state(other).values())


def test_a_shared_router_with_position_codes_is_stored_once(tmp_path):
    model = upcycled_toy(shared=True)
    shared = make_router(1, 6 + 4, 3, 0.3, hidden=10)
    for index, layer in enumerate(moe_layers(model).values()):
        layer.router = LayerEncodedRouter(shared, index, 4)
    save_trained(tmp_path / "routers.ckpt", router_state(model), BELONGS_TO)
    assert set(load_file(tmp_path / "routers.ckpt")) == {"layers.0.shared.out.weight", "layers.0.shared.out.bias"}


def test_a_checkpoint_says_what_it_belongs_to(saved):
    with safe_open(saved, framework="pt") as handle:
        assert BELONGS_TO.items() <= json.loads(handle.metadata()["fusion_merge"])["about"].items()


def test_a_flipped_bit_is_noticed(saved):
    content = bytearray(saved.read_bytes())
    for position in (-1, -20, len(content) // 2):
        content[position] ^= 4
        saved.write_bytes(content)
        _refused(saved, "router checkpoint")
        content[position] ^= 4
    content[-1] ^= 4
    saved.write_bytes(content)
    _refused(saved, "is damaged: its values are not those that were written")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "e_wemoe"}, "`method` is 'wemoe' there and 'e_wemoe' here"),
        (
            {"options": {"init_lambda": 0.4, "router_hidden_layers": 2}},
            r"`options\.init_lambda` is 0\.3 there and 0\.4 here",
        ),
        ({"options": {"init_lambda": 0.3}}, r"`options\.router_hidden_layers` is 2 there and None here"),
        ({"tasks": ["dogs", "cats"]}, r"`tasks` is \['cats', 'dogs'\] there and \['dogs', 'cats'\] here"),
        (
            {"fingerprints": {"_pretrained_": "ab", "cats": "xx", "dogs": "ef"}},
            r"`fingerprints\.cats` is 'cd' there and 'xx' here",
        ),
        ({"version": 2}, "`version` is 1 there and 2 here"),
    ],
    ids=["method", "option", "missing_option", "task_order", "fingerprint", "version"],
)
def test_what_does_not_fit_is_refused_with_what_differs(saved, change, message):
    _refused(saved, message, BELONGS_TO | change)


def test_the_difference_that_tells_most_comes_alone(saved):
    fingerprints = dict.fromkeys(BELONGS_TO["fingerprints"], "zz")
    other = BELONGS_TO | {"tasks": ["x"], "fingerprints": fingerprints}
    _refused(saved, r"does not fit: `tasks` is \['cats', 'dogs'\] there and \['x'\] here$", other)
    _refused(saved, "does not fit: `method` is 'wemoe' there and 'e_wemoe' here$", other | {"method": "e_wemoe"})


def test_all_other_differences_are_listed(saved):
    fingerprints = dict.fromkeys(BELONGS_TO["fingerprints"], "zz")
    _refused(saved, "`fingerprints._pretrained_` .*; `fingerprints.cats`", BELONGS_TO | {"fingerprints": fingerprints})


def test_numbers_of_equal_value_do_not_differ(saved):
    load_trained(saved, router_state(_other()), json.loads(json.dumps(BELONGS_TO)) | {"tasks": ("cats", "dogs")})


def test_routers_of_other_shapes_are_refused(saved):
    _refused(saved, "does not fit: shape of `layers", model=upcycled_toy(depth=1))


def test_a_missing_file_is_refused(tmp_path):
    _refused(tmp_path / "none.ckpt", r"none\.ckpt` does not exist")


def test_a_folder_is_refused(tmp_path):
    _refused(tmp_path, "router checkpoint")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\xff" * 64])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "x.ckpt").write_bytes(content)
    _refused(tmp_path / "x.ckpt", r"cannot read router checkpoint .*x\.ckpt")


def test_a_torch_file_is_refused(tmp_path, model):
    torch.save(model.state_dict(), tmp_path / "x.ckpt")
    _refused(tmp_path / "x.ckpt", "cannot read router checkpoint")


@pytest.mark.parametrize("keep", [4, 100, -4], ids=["length", "header", "data"])
def test_a_truncated_file_is_refused(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    _refused(saved, "cannot read router checkpoint")


@pytest.mark.parametrize("metadata", [None, {"fusion_merge": "[]"}, {"fusion_merge": "null"}])
def test_safetensors_that_are_no_checkpoint_are_refused(tmp_path, model, metadata):
    save_file(router_state(model), tmp_path / "x.ckpt", metadata=metadata)
    _refused(tmp_path / "x.ckpt", "is not a router checkpoint")


def test_a_checkpoint_whose_description_is_broken_is_refused(tmp_path, model):
    save_file(router_state(model), tmp_path / "x.ckpt", metadata={"fusion_merge": "{"})
    _refused(tmp_path / "x.ckpt", "cannot read router checkpoint")


@pytest.mark.parametrize("error", [OSError(28, "No space left"), SafetensorError("I/O error: No space left")], ids=repr)
def test_a_failure_while_writing_leaves_the_old_checkpoint(saved, monkeypatch, error):
    before = saved.read_bytes()

    def half(_tensors, path, **_):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(sealed, "save_file", half)
    with pytest.raises(FusionMergeError, match=r"routers\.ckpt.*No space left"):
        save_trained(saved, router_state(_other()), BELONGS_TO)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]  # noqa: PTH208


def test_a_place_that_cannot_be_written_to_is_an_error(tmp_path, model):
    (tmp_path / "file").write_text("")
    with pytest.raises(FusionMergeError, match="cannot write"):
        save_trained(tmp_path / "file" / "routers.ckpt", router_state(model), BELONGS_TO)


def test_a_tilde_is_the_home_folder(tmp_path, model, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_trained("~/routers.ckpt", router_state(model), BELONGS_TO)
    load_trained("~/routers.ckpt", router_state(_other()), BELONGS_TO)
    assert (tmp_path / "routers.ckpt").is_file()
