"""What this machine has: memory, room on its disks, and how fast it computes."""

from __future__ import annotations

import io
import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fusion_merge.planning.geometry import Geometry

_STATUS, _MEMINFO = Path("/proc/self/status"), Path("/proc/meminfo")
_CGROUPS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_SECONDS = 0.2


def resident_now() -> int:
    """Return how much memory this process has in RAM, in bytes; where that is not told, the most it ever had."""
    if (found := _field(_STATUS, "VmRSS")) is not None:
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def available_memory(device: torch.device) -> int | None:
    """Return how much memory is free for this run, in bytes; None where that is not known.

    Args:
        device: where: a GPU, or the CPU, for which what containers may take counts too.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = _field(_MEMINFO, "MemAvailable")
    if free is None and {"SC_AVPHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [int(text) for path in _CGROUPS if (text := _read(path).strip()).isdigit()]
    found = [amount for amount in (free, *limits) if amount is not None and amount > 0]
    return min(found) if found else None


def free_disk(path: Path) -> int | None:
    """Return how much can be written at a path that need not exist yet, in bytes; None where that is not known.

    Args:
        path: a file or folder.
    """
    try:
        return shutil.disk_usage(_existing(path)).free
    except OSError:
        return None


def disk_of(path: Path) -> int:
    """Return a number that is the same for paths on the same file system.

    Args:
        path: a file or folder that need not exist yet.
    """
    try:
        return _existing(path).stat().st_dev
    except OSError:
        return -1


def _existing(path: Path) -> Path:
    target = path.absolute()
    return next(p for p in (target, *target.parents) if p.exists())


def _field(file: Path, name: str) -> int | None:
    found = re.search(rf"^{name}:\s+(\d+) kB", _read(file), re.MULTILINE)
    return 1024 * int(found[1]) if found else None


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


@dataclass(frozen=True)
class Speed:
    """How fast this machine is.

    Attributes:
        products: multiplications with additions a second, in a large matrix product of the tower.
        traffic: bytes a second that are read from memory.
        decoding: seconds that one image takes to decode and preprocess.
    """

    products: float
    traffic: float
    decoding: float


def measure_speed(
    geometry: Geometry, device: torch.device, batch_size: int, preprocess: Callable[[Any], Tensor] | None
) -> Speed:
    """Measure the speed that this machine has when nothing else runs, in less than a second.

    Args:
        geometry: of the tower.
        device: where it will compute.
        batch_size: images a step.
        preprocess: from one image to a tensor, if there are any images.
    """
    decoding = _decoding(geometry.side, preprocess) if preprocess is not None else 0.0
    threads = torch.get_num_threads()
    rows = min(batch_size * geometry.tokens, 4096 if device.type == "cuda" else 256)
    try:
        torch.set_num_threads(1)  # several would wait for each other wherever something else runs
        tokens = torch.zeros(rows, geometry.width, device=device)
        weight = torch.zeros(geometry.width, geometry.hidden, device=device)
        out = torch.empty(rows, geometry.hidden, device=device)
        seconds = _time(lambda: torch.mm(tokens, weight, out=out), device)
        many = torch.zeros(8 * 2**20, device=device)  # 32 MB: more than caches hold
        traffic = many.nbytes / _time(many.sum, device)
    finally:
        torch.set_num_threads(threads)
    share = 1 if device.type == "cuda" else threads
    return Speed(share * rows * geometry.matrix / seconds, traffic, decoding)


def _time(run: Callable[[], Tensor], device: torch.device) -> float:
    """Return the seconds of the quickest of as many runs as fit into a fifth of a second, and of three at least."""

    def once() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    end, found = time.perf_counter() + _SECONDS, [once()]
    while len(found) < 3 or time.perf_counter() < end:
        found.append(once())
    return max(min(found), 1e-9)


def _decoding(side: int, preprocess: Callable[[Any], Tensor]) -> float:
    """Return the seconds that a synthetic JPEG, a little larger than what the tower takes, needs to become a tensor."""
    noise = np.random.default_rng(0).integers(0, 255, (8, 8, 3)).astype(np.uint8)
    stream = io.BytesIO()
    larger = Image.fromarray(noise).resize((2 * side, side * 3 // 2), Image.Resampling.BICUBIC)
    larger.save(stream, "JPEG", quality=90)

    def once() -> float:
        start = time.perf_counter()
        with Image.open(io.BytesIO(stream.getvalue())) as image:
            preprocess(image.convert("RGB"))
        return time.perf_counter() - start

    return min(once() for _ in range(3))
