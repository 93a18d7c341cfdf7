"""A wheel installed elsewhere, without the repository, runs the default job."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the wheel installed, and nothing of the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("fusion_merge", "config", "hydra_plugins"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder / "dist"), str(source)]
    subprocess.run(build, check=True, cwd=folder, capture_output=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def test_installed_wheel_runs_the_default_job_outside_the_repository(site, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fusion_merge", "fast_dev_run=true", "output_dir=run"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report["baselines"]) == {"zero_shot", "fine_tuned", "task_arithmetic"}
    assert report["run"]["adaptation"]["steps"] == 1


def test_the_wheel_is_what_was_run(site, tmp_path):
    code = "import fusion_merge, fusion_merge.config as c; print(fusion_merge.__file__, *c.__path__, sep='\\n')"
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    package = site / "fusion_merge"
    assert result.stdout.splitlines() == [str(package / "__init__.py"), str(package / "config")]
    assert (site / "fusion_merge" / "py.typed").is_file()
    for folder in ("fusion_merge/pools/prompts", "config/dataset/task", "config/model", "config/modelpool"):
        installed = site / (folder if folder.startswith("fusion_merge") else f"fusion_merge/{folder}")
        source = {str(f.relative_to(ROOT / folder)) for f in (ROOT / folder).rglob("*.yaml")}
        assert {str(f.relative_to(installed)) for f in installed.rglob("*.yaml")} == source != set()


def test_the_wheel_brings_its_plugins(site, tmp_path):
    (tmp_path / "program.yaml").write_text("seed: null\nfast_dev_run: false\n")
    code = f"""if True:
        import sys, types, hydra_plugins.fusion_merge_plugin as plugin
        from hydra import compose, initialize_config_dir
        sys.modules["fusion_bench"] = types.ModuleType("fusion_bench")
        with initialize_config_dir({str(tmp_path)!r}, version_base=None):
            method = compose("program", overrides=["+method=fusion_merge/wemoe"]).method
        print(plugin.__file__, method.algorithm, sep="\\n")
    """
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    plugin = site / "hydra_plugins" / "fusion_merge_plugin" / "__init__.py"
    assert result.stdout.splitlines() == [str(plugin), "fusion_merge.methods.wemoe.WEMoEAlgorithm"]
    assert not (site / "hydra_plugins" / "__init__.py").exists()  # other packages have plugins there too
    assert (site / "fusion_merge" / "plugins" / "fusion_bench.py").is_file()
