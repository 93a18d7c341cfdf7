"""How many worker processes a machine can take."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fusion_merge.processes import world_size

CGROUPS = Path("/sys/fs/cgroup")
"""Where Linux tells the limits of containers and services."""
OWN_CGROUP = Path("/proc/self/cgroup")


def fitting_workers(wanted: int, num_loaders: int) -> int:
    """Return how many worker processes each of several loaders gets: the machine is shared, never crowded.

    Args:
        wanted: the most a loader may have, at least 0.
        num_loaders: how many loaders live at a time in this process; the other processes of a run have as many.
    """
    available = max(1, available_cpus() // _processes_here())
    return min(wanted, max(0, available - 1) // max(1, num_loaders) if num_loaders > 1 else available)


def available_cpus() -> int:
    """Return how many CPUs this process may use, at least 1: its affinity, and its container's or service's share."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min([allowed, *_quotas()])))


def _processes_here() -> int:
    """Return how many processes of this run share the machine."""
    everywhere = world_size()
    here = os.environ.get("LOCAL_WORLD_SIZE", "") if everywhere > 1 else ""  # what torchrun tells
    return int(here) if here.isdecimal() and int(here) > 0 else everywhere


def _quotas() -> Iterator[float]:
    """Give the limits, in CPUs, of this process's control groups and of all above them, of either version."""
    for line in _read(OWN_CGROUP).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            for folder in _upwards(CGROUPS, path):
                yield from _share(*(_read(folder / "cpu.max").split() or ["max"]))
        elif "cpu" in controllers.split(","):
            for folder in _upwards(CGROUPS / "cpu", path):
                yield from _share(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """Give a group's folder and those above it; in a container the path may be the host's, so that only the root is."""
    parts = [part for part in path.strip().split("/") if part not in ("", "..")]
    for length in range(len(parts), -1, -1):
        yield root.joinpath(*parts[:length])


def _share(quota: str, period: str = "100000") -> Iterator[float]:
    try:
        if int(quota) > 0 and int(period) > 0:  # version 1 says -1, version 2 `max`, where there is no limit
            yield int(quota) / int(period)
    except ValueError:
        return


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
