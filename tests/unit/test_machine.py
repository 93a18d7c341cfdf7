"""Workers fit the machine: its CPUs, the limits of a container, and the other processes of a run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fusion_merge.pools import machine
from fusion_merge.pools.machine import available_cpus, fitting_workers


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Pretend to have 16 CPUs, and control groups with the given files."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(machine, "OWN_CGROUP", tmp_path / "own")

    def write(own: str, files: dict[str, str]) -> None:
        (tmp_path / "own").write_text(own)
        for name, content in files.items():
            file: Path = tmp_path / "fs" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content + "\n")

    return write


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "200000 100000"}, 2),
        ("0::/\n", {"cpu.max": "max 100000"}, 16),
        ("0::/\n", {"cpu.max": "250000 100000"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/\n", {"cpu.max": "400000"}, 4),
        ("0::/user/job\n", {"user/cpu.max": "300000 100000", "user/job/cpu.max": "max 100000"}, 3),
        ("0::/user/job\n", {"user/cpu.max": "900000 100000", "user/job/cpu.max": "400000 100000"}, 4),
        ("0::/../outside/the/container\n", {"cpu.max": "500000 100000"}, 5),
        (
            "3:cpu,cpuacct:/job\n0::/\n",
            {"cpu/job/cpu.cfs_quota_us": "600000", "cpu/job/cpu.cfs_period_us": "100000"},
            6,
        ),
        ("3:cpu,cpuacct:/host/id\n", {"cpu/cpu.cfs_quota_us": "700000", "cpu/cpu.cfs_period_us": "100000"}, 7),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
        ("2:cpuset:/x\n", {"cpu.max": "200000 100000"}, 16),
        ("nonsense\n", {"cpu.max": "nonsense"}, 16),
        ("0::/\n", {"cpu.max": ""}, 16),
        ("0::/\n", {"cpu.max": "9900000 100000"}, 16),
    ],
)
def test_limits_of_containers_count(groups, own, files, expected):
    groups(own, files)
    assert available_cpus() == expected


def test_systems_without_control_groups_have_their_cpus(groups):
    assert available_cpus() == 16


def test_systems_without_affinity_have_their_cpus(groups, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cpus() == 1


@pytest.mark.parametrize(
    ("processes", "local", "loaders", "expected"),
    [
        (1, None, 1, 16),
        (4, None, 1, 4),
        (4, "2", 1, 8),
        (2, None, 3, 2),
        (32, None, 1, 1),
        (32, None, 2, 0),
        (1, "8", 1, 16),
    ],
)
def test_processes_of_a_run_share_the_machine(groups, monkeypatch, processes, local, loaders, expected):
    monkeypatch.setattr(machine, "world_size", lambda: processes)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert fitting_workers(99, loaders) == expected
