"""The example of a package with a method of its own is installed elsewhere, as its README says, and used."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documents import commands

from fusion_merge.presets import preset_names

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "third_party_method"
README = (EXAMPLE / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the example installed, offline and from a copy, so that nothing is built in the repository."""
    folder = tmp_path_factory.mktemp("third_party")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", ".pytest_cache")
    shutil.copytree(EXAMPLE, folder / "source", ignore=ignore)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps"]
    target = ["--no-build-isolation", "--no-index", "--target", str(folder / "site"), str(folder / "source")]
    subprocess.run([*pip, *target], check=True, cwd=folder, capture_output=True)
    return folder / "site"


def run(site: Path, cwd: Path, *command: str) -> str:
    """Run a command where the package is installed, and return what it says."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("command", commands(README, "fusion_merge"))
def test_command_of_the_example_runs(command, site, tmp_path):
    arguments = shlex.split(command)[1:]
    says = arguments[0] in ("describe", "--help")
    quick = [] if says else ["fast_dev_run=true", "baselines=[]", "output_dir=run"]
    shown = run(site, tmp_path, sys.executable, "-m", "fusion_merge", *arguments, *quick)
    assert "median" in shown
    if says:
        assert "scaling_factor" in shown or arguments == ["--help"]
        return
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["run"]["method"] == "median"
    assert report["run"]["options"] == {"scaling_factor": 0.5}


def test_test_of_the_example_passes(site, tmp_path):
    (command,) = commands(README, "python")
    assert shlex.split(command)[1:] == ["-m", "pytest", str(EXAMPLE.relative_to(ROOT))]
    copy = tmp_path / "tests"
    shutil.copytree(EXAMPLE / "tests", copy, ignore=shutil.ignore_patterns("__pycache__"))
    shown = run(site, tmp_path, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(copy))
    assert "3 passed" in shown


def test_wrong_name_finds_the_method_of_the_package(site, tmp_path):
    command = [sys.executable, "-m", "fusion_merge", "method=medain"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: `method=medain` is not a preset; did you mean `median`?"]


def test_without_the_package_there_is_no_such_preset():
    assert "median" not in preset_names("method")


def test_example_is_the_method_that_the_page_explains():
    page = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")
    source = (EXAMPLE / "median_merging" / "median.py").read_text(encoding="utf-8")
    body = source[source.index("        self.check(modelpool, taskpool)") :]
    assert body in page
