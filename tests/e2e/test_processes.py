"""Two processes compute what one does, score every image once, and only the first of them writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import TASKS
from runs import files_in, own_pool, run_cli
from safetensors.torch import load_file

from fusion_merge import CLIPVisionModelTaskPool
from fusion_merge.pools.loaders import Placement, evaluation_loader

STEPS = ["method.max_steps=3", "method.lr=0.01", "method.save_checkpoint=routers", "baselines=[zero_shot]"]
SMALL = {
    "rankone_moe": ["method.rank_k=4", "method.select_k=5"],
    "fusion_moe": ["method.rank_k=4", "method.objective=expert_labels+infomax"],
}
TWO = ["fabric.accelerator=cpu", "fabric.devices=2", "fabric.strategy=ddp"]


def started(pool_dir: Path, cwd: Path, *arguments: str, launcher: tuple[str, ...] = (sys.executable,)) -> str:
    """Run a command in processes of its own; return what it says."""
    cwd.mkdir(exist_ok=True)
    process = subprocess.run(
        [*launcher, "-m", "fusion_merge", *own_pool(pool_dir), *STEPS, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout + process.stderr


def report_of(cwd: Path) -> dict[str, Any]:
    (file,) = cwd.glob("outputs/*/report.json")
    report: dict[str, Any] = json.loads(file.read_text())
    return report


def assert_alike(two: Path, one: Path) -> None:
    """Compare routers and scores; Adam moves by the sign of a gradient, so rounding is seen at the size of a step."""
    routers, expected = load_file(two / "routers"), load_file(one / "routers")
    assert routers.keys() == expected.keys()
    assert max((routers[name] - expected[name]).abs().max().item() for name in routers) < 1e-5
    reports = report_of(two), report_of(one)
    for scores, others in (reports, [report["baselines"]["zero_shot"] for report in reports]):
        for row in (*TASKS, "average"):
            assert scores[row]["loss"] == pytest.approx(others[row]["loss"], rel=1e-4)
            assert scores[row]["accuracy"] == pytest.approx(others[row]["accuracy"], abs=1e-6)


@pytest.mark.parametrize(
    ("method", "batch_reduce"),
    [("wemoe", True), ("e_wemoe", True), ("rankone_moe", True), ("rankone_moe", False), ("fusion_moe", False)],
)
def test_two_processes_with_the_same_global_batch_adapt_to_the_same_routers(pool_dir, tmp_path, method, batch_reduce):
    options = [f"method={method}", f"method.batch_reduce={batch_reduce}", *SMALL.get(method, [])]
    done = run_cli(*own_pool(pool_dir), *STEPS, *options, "method.batch_size=6", cwd=tmp_path / "one")
    assert done.code == 0, done.err
    started(pool_dir, tmp_path / "two", *options, "method.batch_size=3", *TWO)
    assert_alike(tmp_path / "two", tmp_path / "one")
    assert len(files_in(tmp_path / "two")) == len(files_in(tmp_path / "one"))


def test_torchrun_starts_the_processes_too(pool_dir, tmp_path):
    done = run_cli(*own_pool(pool_dir), *STEPS, "method=wemoe", "method.batch_size=6", cwd=tmp_path / "one")
    assert done.code == 0, done.err
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517")
    started(pool_dir, tmp_path / "two", "method=wemoe", "method.batch_size=3", *TWO, launcher=torchrun)
    assert_alike(tmp_path / "two", tmp_path / "one")


HALF_WAY = """
import sys
from fusion_merge import CLIPVisionModelPool, RankOneMoEAlgorithm
from fusion_merge.adaptation.runtime import make_fabric

root, *tasks = sys.argv[1:]
pool = CLIPVisionModelPool(
    {"_pretrained_": f"{root}/pretrained", **{task: f"{root}/{task}" for task in tasks}},
    test_datasets={task: f"{root}/images/{task}" for task in tasks},
)
options = {"rank_k": 4, "select_k": 5, "lr": 0.01, "batch_size": 3, "max_steps": 2, "cache_dir": "state"}
RankOneMoEAlgorithm(**options).run(pool, fabric=make_fabric(devices=2, accelerator="cpu", strategy="ddp"))
"""


def test_a_pair_of_processes_goes_on_where_a_pair_was(pool_dir, tmp_path):
    options = ["method=rankone_moe", *SMALL["rankone_moe"], "method.batch_size=3", *TWO]
    started(pool_dir, tmp_path / "whole", *options)
    cwd = tmp_path / "resumed"
    cwd.mkdir()
    (cwd / "half_way.py").write_text(HALF_WAY)
    subprocess.run(
        [sys.executable, "half_way.py", str(pool_dir), *TASKS],
        cwd=cwd,
        check=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert len(list((cwd / "state").iterdir())) == 1
    done = started(pool_dir, cwd, *options, "method.cache_dir=state", "method.resume=true")
    assert "going on from step 2" in done
    assert not list((cwd / "state").iterdir())  # a run that comes to its end leaves nothing
    whole, resumed = load_file(tmp_path / "whole" / "routers"), load_file(cwd / "routers")
    assert all((whole[name] == resumed[name]).all() for name in whole)


@pytest.mark.parametrize("size", [1, 3, 5, 128])
def test_every_image_is_scored_exactly_once_over_all_processes(taskpool: CLIPVisionModelTaskPool, size):
    """As many as there are, whatever the number of processes and the batch."""
    for name in TASKS:
        images = taskpool.images(name)
        for world in (1, 2, 3, 7):
            seen = [
                index
                for rank in range(world)
                for batch in evaluation_loader(
                    images, size, workers=0, placement=Placement(rank=rank, world_size=world)
                ).batch_sampler
                for index in batch
            ]
            assert sorted(seen) == list(range(len(images)))


@pytest.mark.parametrize("batch_reduce", [True, False])
def test_two_processes_agree_with_one_where_they_do_not_divide_the_images(pool_dir, tmp_path, batch_reduce):
    """12 and 18 images in batches of 10, a dozen steps, scored in batches of 7 that share one merged weight."""
    options = ["method=wemoe", "method.max_steps=12", f"method.batch_reduce={batch_reduce}", "taskpool.batch_size=7"]
    options += ["method.inference_batch_reduce=true"]
    done = run_cli(*own_pool(pool_dir), *STEPS, *options, "method.batch_size=10", cwd=tmp_path / "one")
    assert done.code == 0, done.err
    started(pool_dir, tmp_path / "two", *options, "method.batch_size=5", *TWO)
    assert_alike(tmp_path / "two", tmp_path / "one")


def test_two_processes_leave_out_the_bad_images_that_one_does(pool_dir, tmp_path):
    shutil.copytree(pool_dir / "images", tmp_path / "images")
    files = sorted((tmp_path / "images" / "cats").rglob("*.png"))
    for i in (0, 5, 6, 11):
        files[i].write_bytes(files[i].read_bytes()[:-100])
    options = [f"taskpool.tasks.{task}={{data: {tmp_path / 'images' / task}}}" for task in TASKS]
    options += ["method=wemoe", "taskpool.on_bad_image=skip", "taskpool.batch_size=5"]
    done = run_cli(*own_pool(pool_dir), *STEPS, *options, "method.batch_size=6", cwd=tmp_path / "one")
    assert done.code == 0, done.err
    started(pool_dir, tmp_path / "two", *options, "method.batch_size=3", *TWO)
    assert_alike(tmp_path / "two", tmp_path / "one")
    for cwd in ("one", "two"):
        report = report_of(tmp_path / cwd)
        assert [scores["cats"]["skipped"] for scores in (report, report["baselines"]["zero_shot"])] == [4, 4]


BROKEN = """
import os, signal
from fusion_merge import cli, sealed
from fusion_merge.adaptation.progress import Progress
from fusion_merge.models import merged_files
from fusion_merge.pools.datasets import ImageTask

def broken(*_args, **_options):
    raise OSError(28, "No space left on device")

def gone(*_args, **_options):
    os.kill(os.getpid(), signal.SIGKILL)

where, rank = os.environ["WHERE"], os.environ.get("LOCAL_RANK", "0")
if where == "progress" and rank == "0":
    sealed.save_file = broken
elif where == "model" and rank == "0":
    merged_files.save_torch_state_dict = broken
elif where == "image" and rank == "1":
    ImageTask.item = broken
elif where in ("gone0", "gone1") and rank == where[-1]:
    Progress.due = gone
cli.main()
"""
BREAKS = {
    "progress": ["error: cannot write `outputs/wemoe-", "error: process 0 failed: cannot write `outputs/wemoe-"],
    "model": ["error: cannot write `merged`", "error: process 0 failed: cannot write `merged`"],
    "image": ["error: cannot read image 0 of `cats`", "error: process 1 failed: cannot read image 0 of `cats`"],
    "gone0": ["error: another process is gone"],
    "gone1": ["error: another process is gone"],
}


@pytest.mark.parametrize("where", BREAKS)
def test_what_ends_one_process_ends_both_soon_and_clearly(pool_dir, tmp_path, where):
    (tmp_path / "broken.py").write_text(BROKEN)
    process = subprocess.run(
        [
            *(sys.executable, "broken.py", *own_pool(pool_dir), *STEPS, "method=wemoe", "method.batch_size=3", *TWO),
            *("method.max_steps=6", "method.save_every=2", "merged_model_save_path=merged"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "WHERE": where},
    )
    assert process.returncode != 0
    assert "Traceback" not in process.stderr
    for message in BREAKS[where]:
        assert message in process.stderr, process.stderr


WAITING = """
import sys, threading
from fusion_merge import cli
from fusion_merge.errors import LostProcessError

def lost(*_args):
    raise LostProcessError("another process is gone")

threading.Thread(target=threading.Event().wait).start()  # an interpreter that ends in its usual way waits for this
cli._run = lost
cli.main()
"""


def test_a_process_whose_companion_is_gone_waits_for_none_of_its_own_threads(pool_dir, tmp_path):
    (tmp_path / "waiting.py").write_text(WAITING)
    command = [sys.executable, "waiting.py", *own_pool(pool_dir), "method=wemoe"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr == "error: another process is gone\n"
