"""The documented pool at real size, of less depth: checkpoints and JPEG images on disk, the routed methods on them."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from runs import run_cli
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[2] / "examples" / "real_size"
TASKS = ["task_1", "task_2", "task_3"]
METHODS = {
    "rankone_moe": ["method.rank_k=8", "method.select_k=8"],
    "wemoe": [],
    "e_wemoe": [],
}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("real")
    options = {"output": folder, "layers": 1, "tasks": len(TASKS), "images": 6}
    script("make_checkpoints").main([word for key, value in options.items() for word in (f"--{key}", str(value))])
    return folder


def test_pool_is_like_a_real_one(pool):
    pretrained = load_file(pool / "pretrained" / "model.safetensors")
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    weight = pretrained[name].float()
    assert weight.shape == (3072, 768)
    others = [load_file(pool / task / "model.safetensors") for task in TASKS]
    vectors = [
        next(t for n, t in other.items() if n.endswith("layers.0.mlp.fc1.weight")).float() - weight for other in others
    ]
    for vector in vectors:
        assert vector.norm() / weight.norm() == pytest.approx(0.03, rel=0.05)
        energies = torch.linalg.svdvals(vector[:512]).square()
        assert 0.7 < energies[:16].sum() / energies.sum() < 0.95  # mostly of low rank, and not altogether
    assert abs(torch.cosine_similarity(vectors[0].flatten(), vectors[1].flatten(), dim=0)) < 0.1
    sizes, modes = set(), set()
    for path in (pool / "images").rglob("*.jpg"):
        with Image.open(path) as image:
            sizes.add(image.size)
            modes.add(image.mode)
    assert len(sizes) > 10
    assert min(min(size) for size in sizes) >= 160


@pytest.mark.parametrize("method", METHODS)
def test_method_adapts_and_scores_at_full_width(pool, tmp_path, method):
    arguments = (pool / "arguments.txt").read_text().split()
    options = [f"method={method}", *METHODS[method], "method.max_steps=2", "method.batch_size=2", "baselines=[]"]
    done = run_cli(*arguments, *options, "output_dir=out", cwd=tmp_path)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["run"]["adaptation"]["steps"] == 2
    for task in TASKS:
        assert math.isfinite(report[task]["loss"])
        assert 0 <= report[task]["accuracy"] <= 1
    assert report["model_info"]["all_params"] > 7_000_000


@pytest.mark.parametrize("method", METHODS)
def test_peak_memory_is_what_was_planned(pool, tmp_path, method):
    arguments = [*(pool / "arguments.txt").read_text().split(), f"method={method}", *METHODS[method], "baselines=[]"]
    program = [sys.executable, "-m", "fusion_merge"]
    plan = [*program, "plan", *arguments, "method.max_steps=1", "report_save_path=plan.json"]
    subprocess.run(plan, cwd=tmp_path, check=True, capture_output=True)
    peak = json.loads((tmp_path / "plan.json").read_text())["peak"]["host_bytes"]
    measure = [sys.executable, EXAMPLES / "measure.py", *program, *arguments, "method.max_steps=1"]
    done = subprocess.run(measure, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured = float(re.findall(r"peak memory ([0-9.]+) GB", done.stderr)[-1]) * 1e9
    assert measured == pytest.approx(peak, rel=0.15)


def test_measure_tells_time_and_memory_and_passes_the_exit_code_on():
    allocate = "import sys; x = bytearray(300_000_000); sys.exit(3)"
    done = subprocess.run(
        [sys.executable, EXAMPLES / "measure.py", sys.executable, "-c", allocate],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    seconds, memory = (float(part.split()[i]) for part, i in zip(done.stderr.split(", ")[::2], (1, 2), strict=True))
    assert seconds > 0
    assert 0.29 < memory < 0.6
