"""Several towers that answer together."""

from __future__ import annotations

import pytest
import torch
from runs import assert_refused, own_pool, random_tower, run_cli
from torch.nn import functional as F

from fusion_merge import SimpleEnsembleAlgorithm
from fusion_merge.errors import ConfigError
from fusion_merge.models.ensemble import COMBINATIONS, TowerEnsemble, combined_logits


def test_every_tower_answers():
    towers = [random_tower(seed) for seed in range(3)]
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pooled = TowerEnsemble(towers)(pixels)
        assert pooled.shape == (3, 4, 16)
        for own, tower in zip(pooled, towers, strict=True):
            assert torch.equal(own, tower(pixels).pooler_output)


def test_logits_are_combined_as_asked():
    logits = torch.tensor([[[2.0, 0.0]], [[0.0, 1.0]]])
    mean, probabilities, largest = (TowerEnsemble([], c).combined(logits) for c in ("mean", "probabilities", "max"))
    torch.testing.assert_close(mean, torch.tensor([[1.0, 0.5]]))
    torch.testing.assert_close(largest, torch.tensor([[2.0, 1.0]]))
    torch.testing.assert_close(probabilities.exp(), logits.softmax(dim=-1).mean(dim=0))


def test_logits_of_a_single_tower_stay_as_they_are():
    logits = torch.randn(4, 2)
    assert combined_logits(random_tower(0), logits) is logits


def test_its_scores_are_those_of_the_combined_logits(modelpool, taskpool):
    report = taskpool.evaluate(SimpleEnsembleAlgorithm().run(modelpool))
    for task in taskpool.task_names:
        head, images = taskpool.head(task), taskpool.images(task)
        pixels = torch.stack([images[i][0] for i in range(len(images))])
        labels = torch.tensor([images[i][1] for i in range(len(images))])
        with torch.no_grad():
            towers = [modelpool.load_model(name) for name in modelpool.model_names]
            logits = torch.stack([head(tower(pixels).pooler_output) for tower in towers]).mean(dim=0)
        assert report[task]["accuracy"] == pytest.approx((logits.argmax(dim=-1) == labels).float().mean().item())
        assert report[task]["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_towers_that_are_one_give_that_one_s_logits(combine):
    logits = torch.randn(1, 4, 3).expand(5, -1, -1)
    combined = TowerEnsemble([], combine).combined(logits)
    torch.testing.assert_close(combined.log_softmax(dim=-1), logits[0].log_softmax(dim=-1))


def test_unknown_combinations_are_refused():
    for make in (lambda: TowerEnsemble([], "median"), lambda: SimpleEnsembleAlgorithm(combine="median")):
        with pytest.raises(ConfigError, match="`combine`='median'"):
            make()


def test_it_cannot_be_saved_as_a_tower(pool_dir, tmp_path):
    done = run_cli(
        *own_pool(pool_dir), "method=simple_ensemble", f"merged_model_save_path={tmp_path}/merged", cwd=tmp_path / "run"
    )
    assert_refused(done, tmp_path / "run", "`merged_model_save_path`", "makes no vision tower")


def test_the_skeleton_counts_every_tower(modelpool):
    method = SimpleEnsembleAlgorithm()
    made, bare = method.run(modelpool), method.skeleton(modelpool.config(), 2)
    assert sum(p.numel() for p in bare.parameters()) == sum(p.numel() for p in made.parameters())
    assert all(p.is_meta for p in bare.parameters())
