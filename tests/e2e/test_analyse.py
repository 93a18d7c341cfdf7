"""`fusion_merge analyse`, as whole runs of the command line on small models and images of a user's own."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TASKS
from PIL import Image
from runs import Finished, assert_refused, files_in, own_pool, run_cli
from torch.nn import functional as F

from fusion_merge import CLIPVisionModelPool, CLIPVisionModelTaskPool, MergedCLIPVisionModel
from fusion_merge.moe import Routing, record_coefficients, set_routing
from fusion_merge.report.routing import first_choices

QUICK = ["method.max_steps=2", "method.batch_size=4", "method.lr=0.1"]
LOW_RANK = ["method=rankone_moe", "method.rank_k=4", *QUICK]


def lines_in(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def json_in(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


def assert_picture(file: Path) -> None:
    """Check that there is a picture, and something on it."""
    with Image.open(file) as picture:
        assert picture.width >= 700
        assert len(set(picture.convert("L").resize((200, 120)).tobytes())) > 20


def analysed(pool_dir: Path, cwd: Path, name: str, *arguments: str) -> Finished:
    done = run_cli("analyse", name, *own_pool(pool_dir), *arguments, "output_dir=out", cwd=cwd)
    assert done.code == 0, done.err + done.out
    assert_picture(cwd / "out" / f"{name}.png")
    assert json_in(cwd / "out", name)["command"].startswith("fusion_merge analyse")
    return done


@pytest.fixture(scope="module")
def saved(pool_dir, tmp_path_factory) -> Path:
    """A routed model, saved by the analysis that made it."""
    cwd = tmp_path_factory.mktemp("routing")
    analysed(pool_dir, cwd, "routing", *LOW_RANK, "merged_model_save_path=model", "analyse.images=8")
    return cwd


def coefficients(model: MergedCLIPVisionModel, pool_dir: Path, task: str, images: int) -> list[torch.Tensor]:
    pool = CLIPVisionModelTaskPool({task: str(pool_dir / "images" / task)}, clip_model=str(pool_dir / "pretrained"))
    with record_coefficients(model) as record, torch.no_grad():
        model(torch.stack([pool.images(task)[i][0] for i in range(images)]))
    return [values[0] for values in record.values()]  # (B, K)


def test_routing_shows_the_mean_coefficients_of_each_layer(saved, pool_dir):
    lines = lines_in(saved / "out", "routing")
    assert len(lines) == len(TASKS) * 2 * len(TASKS)  # tasks, layers, experts
    model = MergedCLIPVisionModel.from_pretrained(saved / "model")
    for task in TASKS:
        for layer, values in enumerate(coefficients(model, pool_dir, task, 8)):
            means = values.mean(dim=0).view(len(TASKS), -1).mean(dim=1)
            found = [float(x["coefficient"]) for x in lines if (x["task"], x["layer"]) == (task, str(layer))]
            assert found == pytest.approx(means.tolist(), abs=1e-5)


def test_first_choices_of_a_saved_model_sum_to_one(saved, pool_dir, tmp_path):
    model = MergedCLIPVisionModel.from_pretrained(saved / "model")
    analysed(pool_dir, tmp_path, "first_choice", f"analyse.model={saved / 'model'}", "analyse.images=8")
    sums: dict[Any, float] = defaultdict(float)
    lines = lines_in(tmp_path / "out", "first_choice")
    for line in lines:
        sums[line["task"], line["layer"]] += float(line["share"])
    assert len(sums) == len(TASKS) * 2
    assert list(sums.values()) == pytest.approx([1.0] * len(sums))
    assert json_in(tmp_path / "out", "first_choice")["method"] == "rankone_moe"
    for layer, values in enumerate(coefficients(model, pool_dir, "dogs", 8)):
        rank = values.shape[1] // len(TASKS)
        expected = [(values.argmax(dim=1) // rank == n).double().mean().item() for n in range(len(TASKS))]
        found = [float(x["share"]) for x in lines if (x["task"], x["layer"]) == ("dogs", str(layer))]
        assert found == pytest.approx(expected)
    assert not (tmp_path / "out" / "config.yaml").exists()  # nothing was adapted


def test_first_choices_are_those_of_single_images_however_the_model_averages(saved, pool_dir, tmp_path):
    model = MergedCLIPVisionModel.from_pretrained(saved / "model")
    set_routing(model, Routing.BATCH)
    model.save_pretrained(tmp_path / "batch")
    for name in ("batch", "sample"):
        place = tmp_path / "batch" if name == "batch" else saved / "model"
        analysed(pool_dir, tmp_path / name / "run", "first_choice", f"analyse.model={place}")
    same = [lines_in(tmp_path / name / "run" / "out", "first_choice") for name in ("batch", "sample")]
    assert same[0] == same[1]


def test_the_largest_coefficient_decides():
    records = {"cats": [torch.tensor([[0.1, 0.2, 0.9, 0.0], [0.8, 0.1, 0.2, 0.7], [0.0, 0.0, 0.1, 0.3]])]}
    assert first_choices(records, 2)["cats"].tolist() == [pytest.approx([1 / 3, 2 / 3])]
    assert first_choices(records, 4)["cats"].tolist() == [pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])]


def test_experts_that_are_equally_large_share_the_image():
    records = {"cats": [torch.tensor([[0.3, 0.3, 0.3, 0.1], [0.3, 0.3, 0.3, 0.3]])]}
    assert first_choices(records, 2)["cats"].tolist() == [pytest.approx([(2 / 3 + 1 / 2) / 2, (1 / 3 + 1 / 2) / 2])]


def test_an_interrupt_ends_a_sweep_and_keeps_what_is_done(pool_dir, tmp_path, monkeypatch):
    from fusion_merge.protocols import analyses

    def interrupted(program, name, fabric):
        row, model = measured(program, name, fabric)
        program.method.record.interrupted = True
        return row, model

    measured = analyses.measured
    monkeypatch.setattr(analyses, "measured", interrupted)
    done = analysed(pool_dir, tmp_path, "sparsity", "analyse.values=[0.5,0.9]", *QUICK)
    assert [line["tv_prune_ratio"] for line in lines_in(tmp_path / "out", "sparsity")] == ["0.5"]
    assert "1 of 2 values" in done.out + done.err


def test_variation_needs_no_images_and_agrees_with_torch(pool_dir, tmp_path):
    models = own_pool(pool_dir)[:2]
    done = run_cli("analyse", "variation", *models, "taskpool=dummy", "output_dir=out", cwd=tmp_path)
    assert done.code == 0, done.err
    assert_picture(tmp_path / "out" / "variation.png")
    pool = CLIPVisionModelPool({"_pretrained_": str(pool_dir / "pretrained"), "cats": str(pool_dir / "cats")})
    before, after = pool.state("_pretrained_"), pool.state("cats")
    names = [name for name in before if ".layers.1.mlp." in name]
    a, b = (torch.cat([s[name].flatten() for name in names]).double() for s in (before, after))
    (line,) = [
        x for x in lines_in(tmp_path / "out", "variation") if (x["task"], x["layer"], x["part"]) == ("cats", "1", "mlp")
    ]
    assert float(line["distance"]) == pytest.approx(torch.dist(a, b).item())
    assert float(line["cosine"]) == pytest.approx(F.cosine_similarity(a, b, dim=0).item(), rel=1e-12)
    assert int(line["entries"]) == a.numel()


def test_magnitudes_count_every_entry_once(pool_dir, tmp_path):
    models = own_pool(pool_dir)[:2]
    done = run_cli("analyze", "magnitudes", *models, "taskpool=dummy", "output_dir=out", cwd=tmp_path)
    assert done.code == 0, done.err
    assert_picture(tmp_path / "out" / "magnitudes.png")
    pool = CLIPVisionModelPool({"_pretrained_": str(pool_dir / "pretrained"), "cats": str(pool_dir / "cats")})
    state = pool.state("_pretrained_")
    entries = sum(state[name].numel() for name in state if state[name].is_floating_point())
    lines = lines_in(tmp_path / "out", "magnitudes")
    for task in TASKS:
        assert sum(int(line["entries"]) for line in lines if line["task"] == task) == entries
    below = json_in(tmp_path / "out", "magnitudes")["below"]["cats"]
    assert 0.033 < below["0.5"] < 0.043  # normal noise of deviation 0.05: 0.0337, and 0.0822; up to a bin more
    assert 0.08 < below["0.9"] < 0.105


def test_sparsity_gives_smaller_models_whose_scores_are_those_of_runs_alone(pool_dir, tmp_path):
    analysed(pool_dir, tmp_path, "sparsity", "analyse.values=[0.5,0.9]", *QUICK)
    lines = lines_in(tmp_path / "out", "sparsity")
    assert [line["tv_prune_ratio"] for line in lines] == ["0.5", "0.9"]
    assert int(lines[0]["stored"]) > int(lines[1]["stored"])
    assert float(lines[0]["megabytes"]) > float(lines[1]["megabytes"])
    alone = ["method=e_wemoe", "method.tv_prune_ratio=0.9", *QUICK, "baselines=[]", "output_dir=alone"]
    assert run_cli(*own_pool(pool_dir), *alone, cwd=tmp_path).code == 0
    report = json_in(tmp_path / "alone", "report")
    for task in TASKS:
        assert float(lines[1][task]) == report[task]["accuracy"]
    assert float(lines[1]["average"]) == pytest.approx(report["average"]["accuracy"])
    assert json_in(tmp_path / "out", "sparsity")["rows"][1]["options"]["tv_prune_ratio"] == 0.9


def test_rank_has_the_energy_that_each_rank_explains(pool_dir, tmp_path):
    analysed(pool_dir, tmp_path, "rank", "analyse.values=[2,16]", *QUICK)
    lines = lines_in(tmp_path / "out", "rank")
    assert [line["rank_k"] for line in lines] == ["2", "16"]
    energies = [float(line["explained_energy"]) for line in lines]
    assert 0.1 < energies[0] < 0.6
    assert energies[1] == pytest.approx(1.0)
    assert int(lines[0]["stored"]) < int(lines[1]["stored"])


def test_loss_has_a_line_a_step(pool_dir, tmp_path):
    analysed(pool_dir, tmp_path, "loss", "method=wemoe", *QUICK)
    lines = lines_in(tmp_path / "out", "loss")
    assert [line["step"] for line in lines] == ["1", "2"]
    assert all(float(line[task]) > 0 for line in lines for task in TASKS)


def test_without_a_name_the_analyses_are_listed(tmp_path):
    for spelling in ("analyse", "analyze"):
        done = run_cli(spelling, cwd=tmp_path)
        assert done.code == 0
        for name in ("routing", "first_choice", "variation", "magnitudes", "sparsity", "rank", "loss"):
            assert name in done.out
    assert files_in(tmp_path) == []


def test_dry_run_and_plan_compute_nothing(pool_dir, tmp_path):
    for arguments in (
        ["variation", "dry_run=true"],
        ["sparsity", "dry_run=true"],
        ["routing", "method=wemoe", "plan=true"],
    ):
        done = run_cli("analyse", arguments[0], *own_pool(pool_dir), *arguments[1:], cwd=tmp_path)
        assert done.code == 0, done.err
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["routin"], ["`routin` is not an analysis", "did you mean `routing`?"]),
        (["routing", "method=task_arithmetic"], ["`routing`", "`task_arithmetic`", "method=wemoe"]),
        (["loss", "method=task_arithmetic"], ["`loss`", "`task_arithmetic` adapts nothing"]),
        (["loss", "method=wemoe", "method.checkpoint=x"], ["`method.checkpoint`"]),
        (["sparsity", "method=wemoe"], ["`tv_prune_ratio`", "`wemoe` has not"]),
        (["sparsity", "analyse.values=[1.5]"], ["`tv_prune_ratio`=1.5"]),
        (["sparsity", "merged_model_save_path=kept"], ["`merged_model_save_path`='kept'", "keeps none"]),
        (["sparsity", "analyse.values=[]"], ["`analyse.values`=[]"]),
        (["rank", "analyse.values=[1.5]"], ["`analyse.values` has 1.5", "whole number"]),
        (["rank", "analyse.values=[4,64]"], ["`rank_k`=64"]),
        (["routing", "analyse.values=[1]", "method=wemoe"], ["`analyse.values`", "`routing` tries no values"]),
        (["variation", "analyse.model=x"], ["`analyse.model`='x'", "`variation`"]),
        (["routing", "analyse.model=nowhere"], ["nowhere"]),
        (["routing", "analyse.images=0", "method=wemoe"], ["`analyse.images`=0"]),
        (["routing", "analyse.pictures=0", "method=wemoe"], ["`analyse.pictures`"]),
        (["routing", "protocol=robustness", "method=wemoe"], ["`protocol`", "leave it out"]),
        (["routing", "taskpool=dummy", "method=wemoe"], ["`routing` needs images of tasks"]),
    ],
)
def test_what_does_not_fit_is_refused_by_name(arguments, texts, pool_dir, tmp_path):
    pools = own_pool(pool_dir)[: 2 if "taskpool=dummy" in arguments else None]
    assert_refused(run_cli("analyse", *arguments, *pools, cwd=tmp_path), tmp_path, *texts)


def test_a_saved_tower_that_is_not_routed_is_refused(pool_dir, tmp_path):
    place = f"analyse.model={pool_dir / 'cats'}"
    done = run_cli("analyse", "routing", *own_pool(pool_dir), place, cwd=tmp_path)
    assert_refused(done, tmp_path, str(pool_dir / "cats"), "not a merged one")
