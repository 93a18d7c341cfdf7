"""Worker processes end when they should: after an error, after Ctrl-C, and when one of them is killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import own_pool

from fusion_merge import WEMoEAlgorithm
from fusion_merge.adaptation.objectives import OBJECTIVES
from fusion_merge.errors import DataError
from fusion_merge.pools import machine
from fusion_merge.pools.datasets import ImageTask
from fusion_merge.pools.images import TaskImages
from fusion_merge.pools.loaders import Placement, adaptation_loader, evaluation_loader


def images_of(size: int) -> TaskImages:
    data = [(np.full((2, 2, 3), i), 0) for i in range(size)]
    task = ImageTask("numbers", data, 0, 1, ("one",), ("{}",))
    return TaskImages(task, lambda image: torch.tensor(image).permute(2, 0, 1).float(), 0)


def wait_for(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_more_workers_than_images_do_no_harm():
    batches = iter(adaptation_loader(images_of(1), 3, 0, workers=2, placement=Placement()))
    assert [len(pixels) for pixels, _ in islice(batches, 5)] == [3] * 5
    batches.close()
    loader = evaluation_loader(images_of(2), 1, workers=9, placement=Placement())
    assert loader.num_workers == 2
    assert len(list(loader)) == 2
    assert list(evaluation_loader(images_of(2), 5, workers=9, placement=Placement(rank=1, world_size=2))) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch opens files to see if it can
def test_killed_worker_ends_the_run_with_a_way_out():
    batches = iter(adaptation_loader(images_of(4), 2, 0, workers=2, placement=Placement()))
    next(batches)
    workers = batches.workers
    os.kill(workers[0].pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"a worker process that reads images of `numbers` has ended.*`num_workers`"):
        list(islice(batches, 50))
    assert wait_for(lambda: not any(worker.is_alive() for worker in workers))
    assert list(batches) == []


@pytest.mark.parametrize("killed", [True, False])
def test_connection_that_ends_with_its_worker_says_that_the_worker_ended(killed):
    batches = iter(adaptation_loader(images_of(4), 2, 0, workers=2, placement=Placement()))
    next(batches)
    worker = batches.workers[0]
    if killed:
        os.kill(worker.pid, signal.SIGKILL)
        with contextlib.suppress(RuntimeError):  # torch says so wherever the program is
            wait_for(lambda: not worker.is_alive())
        assert not worker.is_alive()
    inner = batches._batches

    class Broken:
        _shutdown_workers, _workers = inner._shutdown_workers, inner._workers

        def __next__(self):
            raise EOFError("the other end is gone")

    batches._batches = Broken()
    with pytest.raises(DataError if killed else EOFError, match="worker process.*`num_workers`" if killed else "gone"):
        next(batches)


def test_evaluation_leaves_no_worker_behind():
    batches = iter(evaluation_loader(images_of(6), 2, workers=2, placement=Placement()))
    workers = batches.workers
    assert len(list(batches)) == 3
    assert wait_for(lambda: not any(worker.is_alive() for worker in workers))


@pytest.fixture
def big_machine(monkeypatch):
    """A machine with CPUs enough for workers, and datasets too large to be kept."""
    monkeypatch.setattr(machine, "available_cpus", lambda: 5)
    monkeypatch.setattr(TaskImages.__init__, "__defaults__", (0,))


@pytest.mark.usefixtures("big_machine")
def test_error_in_adaptation_ends_the_workers_of_all_tasks(modelpool, monkeypatch):
    started = []

    def fail(*_args):
        started.extend(multiprocessing.active_children())
        raise ZeroDivisionError("made by the test")

    monkeypatch.setitem(OBJECTIVES, "entropy", fail)
    with pytest.raises(ZeroDivisionError) as caught:
        WEMoEAlgorithm(max_steps=2, batch_size=2, num_workers=2).run(modelpool)
    assert caught.tb is not None  # which refers to everything
    assert len(started) == 4
    assert wait_for(lambda: not any(worker.is_alive() for worker in started))


INTERRUPTED = """
import os, signal
from fusion_merge import cli
from fusion_merge.adaptation import loop
from fusion_merge.pools import machine
from fusion_merge.pools.images import TaskImages

def interrupt(_fabric, _metrics, step):
    if step == 1:
        os.killpg(0, signal.SIGINT)  # as a terminal does: to all processes of the run

loop.log_metrics = interrupt
machine.available_cpus = lambda: 5
TaskImages.__init__.__defaults__ = (0,)
cli.main()
"""


def test_ctrl_c_keeps_the_routers_and_leaves_no_process_behind(pool_dir, tmp_path):
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    options = ["method=wemoe", "method.max_steps=100000", "method.batch_size=2", "method.num_workers=2", "baselines=[]"]
    process = subprocess.Popen(
        [sys.executable, "interrupted.py", *own_pool(pool_dir), *options],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert "interrupted after step 3 of 100000" in said
    assert "Traceback" not in said
    assert not _group(process.pid)


def _group(leader: int) -> list[str]:
    """The processes of a group that are still there."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == leader and fields[0] != "Z":
            found.append(status.parent.name)
    return found
