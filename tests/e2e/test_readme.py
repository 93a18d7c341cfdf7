"""Every command and every line of Python that the README shows is run here, as it is written."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
from pathlib import Path

import pytest
from documents import blocks, commands
from runs import run_cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


QUICK = ["fast_dev_run=true", "baselines=[]"]


@pytest.mark.parametrize("command", commands(README, "fusion_merge"))
def test_command_of_the_readme_runs(command, home):
    arguments = shlex.split(command)[1:]
    asks_only = any(a in ("plan", "describe", "--help", "--cfg") for a in arguments)
    result = run_cli(*arguments, *([] if asks_only else QUICK), cwd=home)
    assert result.code == 0, result.err
    assert result.out.strip()


def test_python_of_the_readme_runs_from_the_first_line_to_the_last(home):
    code = "\n".join(blocks(README, "python")).replace("max_steps=200", "max_steps=2")
    names = {}
    with contextlib.chdir(home):
        exec(compile(code, "README.md", "exec"), names)
    assert (home / "merged" / "config.json").is_file()
    assert names["probabilities"].shape == (1, 2)
    assert names["probabilities"].sum().item() == pytest.approx(1)


@pytest.mark.parametrize("command", commands(README, "make"))
def test_make_target_of_the_readme_exists_and_installs_the_tested_versions(command, tmp_path):
    dry = [*command.split(), "-n", "--no-print-directory", f"VENV={tmp_path / 'venv'}"]
    outside = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    shown = subprocess.run(dry, cwd=ROOT, env=outside, capture_output=True, text=True, check=True).stdout
    assert "-c constraints.txt" in shown
    assert {"make run": "fusion_merge", "make test": "pytest"}[command] in shown.splitlines()[-1]


@pytest.mark.parametrize("target", ["run", "test"])
def test_environment_that_could_not_be_made_is_not_left_behind(target, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\nmkdir -p "$3/bin" && touch "$3/bin/python"\nexit 1\n')
    python.chmod(0o755)
    outside = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    command = ["make", target, f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True)
    assert done.returncode != 0
    assert [path.name for path in tmp_path.iterdir()] == ["python"]
