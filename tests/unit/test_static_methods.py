"""The static methods on whole pools: their options, what they refuse, and which images RegMean looks at."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TASKS
from PIL import Image
from runs import assert_same_bits, module_pool, random_tower, run_cli, tensors_of
from torch import Tensor

from fusion_merge import (
    CLIPVisionModelPool,
    DareAlgorithm,
    IsoCAlgorithm,
    IsoCTSAlgorithm,
    RegMeanAlgorithm,
    SimpleAverageAlgorithm,
    TaskArithmeticAlgorithm,
    TiesMergingAlgorithm,
    TSVMAlgorithm,
)
from fusion_merge.errors import ConfigError, DataError
from fusion_merge.methods.base import Method
from fusion_merge.methods.static_base import StaticMethod
from fusion_merge.models.clip import module_state
from fusion_merge.models.sources import LazyState
from fusion_merge.models.tensor_names import linear_weights, listed_tensors

FC1, QUERY = "encoder.layers.0.mlp.fc1.weight", "encoder.layers.1.self_attn.q_proj.weight"


def state_of(method: Method, modelpool: CLIPVisionModelPool) -> dict[str, Tensor]:
    return module_state(method.run(modelpool))


def average_of(modelpool: CLIPVisionModelPool, name: str) -> Tensor:
    return torch.stack([modelpool.state(task)[name] for task in modelpool.model_names]).mean(dim=0)


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> set[str]:
    return {name for name in first if not torch.allclose(first[name], second[name], atol=1e-6)}


# Names of tensors


def test_names_may_be_written_as_in_any_layout():
    known = {FC1, QUERY}
    assert listed_tensors("exclude_keys", [FC1, f"vision_model.{QUERY}"], known) == known
    assert listed_tensors("exclude_keys", None, known) == listed_tensors("exclude_keys", [], known) == frozenset()


@pytest.mark.parametrize(
    "method",
    [
        TiesMergingAlgorithm(remove_keys=["encoder.layers.0.mlp.fc1.wieght"]),
        DareAlgorithm(merging="ties_merging", remove_keys=["encoder.layers.0.mlp.fc1.wieght"]),
        TSVMAlgorithm(exclude_keys=["encoder.layers.0.mlp.fc1.wieght"]),
        IsoCAlgorithm(exclude_keys=["encoder.layers.0.mlp.fc1.wieght"]),
        IsoCTSAlgorithm(exclude_keys=["encoder.layers.0.mlp.fc1.wieght"]),
    ],
    ids=lambda method: method.method_name,
)
def test_a_name_of_no_tensor_is_refused_before_any_weight_is_read(method, modelpool, monkeypatch):
    monkeypatch.setattr(LazyState, "__getitem__", lambda *_: pytest.fail("read"))
    with pytest.raises(ConfigError, match=rf"no tensor of the models; did you mean `{FC1}`"):
        method.check(modelpool)


def test_weights_of_linear_layers_are_known(modelpool):
    found = linear_weights(modelpool.config())
    assert len(found) == 2 * 6
    assert {FC1, QUERY} < found
    assert "embeddings.position_embedding.weight" not in found


# TIES and DARE


def test_removed_tensors_stay_pretrained_and_do_not_count(modelpool):
    kept = state_of(TiesMergingAlgorithm(remove_keys=[f"vision_model.{FC1}"]), modelpool)
    assert torch.equal(kept[FC1], modelpool.state("_pretrained_")[FC1])
    assert differing(kept, state_of(TiesMergingAlgorithm(), modelpool)) > {FC1}  # the threshold is another


@pytest.mark.parametrize(("threshold", "way_out"), [(0.2, "give 20 if"), (1, "give 100 if")])
@pytest.mark.parametrize("method", [TiesMergingAlgorithm, partial(DareAlgorithm, merging="ties_merging")])
def test_a_threshold_that_may_be_a_share_is_refused(method, threshold, way_out):
    with pytest.raises(ConfigError, match=rf"`threshold`=.* is a percentage here, but a share .*{way_out}"):
        method(threshold=threshold)


def test_a_threshold_that_takes_no_part_is_let_be():
    assert DareAlgorithm(merging="task_arithmetic", threshold=0.5).threshold == 0.5


def test_dare_that_drops_nothing_is_the_merge_itself(modelpool):
    for options, plain in (
        ({"merging": "task_arithmetic"}, TaskArithmeticAlgorithm()),
        ({"merging": "simple_average"}, SimpleAverageAlgorithm()),
        ({"merging": "ties_merging"}, TiesMergingAlgorithm()),
    ):
        merged = state_of(DareAlgorithm(sparsity_ratio=0.0, **options), modelpool)
        assert differing(merged, state_of(plain, modelpool)) == set(), options


def test_dare_has_a_seed_and_may_spare_all_but_linear_layers(modelpool):
    first, second = (state_of(DareAlgorithm(seed=seed), modelpool) for seed in (0, 1))
    assert differing(first, second) == set(first)
    spared = state_of(DareAlgorithm(only_on_linear_weights=True), modelpool)
    plain = state_of(TaskArithmeticAlgorithm(), modelpool)
    assert differing(spared, plain) == linear_weights(modelpool.config())


def test_dare_refuses_what_its_merging_does_not_take():
    with pytest.raises(ConfigError, match="goes with `merging`=ties_merging, not simple_average"):
        DareAlgorithm(merging="simple_average", remove_keys=[FC1])
    with pytest.raises(ConfigError, match=r"`sparsity_ratio`=1\.0.* must be below 1"):
        DareAlgorithm(sparsity_ratio=1)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("dare/task_arithmetic", {"merging": "task_arithmetic", "scaling_factor": 0.3}),
        ("dare/simple_average", {"merging": "simple_average"}),
        ("dare/ties_merging", {"merging": "ties_merging", "scaling_factor": 0.5, "threshold": 20.0}),
        ("isotropic_merging/iso_c", {"scaling_factor": 1.0}),
        ("isotropic_merging/iso_cts", {"common_space_fraction": 0.8}),
        ("task_singular_vector/TaskSingularVectorMerging", {"alpha": 1.0}),
        ("regmean/clip_regmean", {"num_regmean_examples": 256}),
        ("clip_regmean", {"reduce_non_diagonal_ratio": 0.95}),
        ("ties", {"scaling_factor": 0.3}),
    ],
)
def test_paths_of_fusion_bench_are_presets(method, expected, tmp_path):
    import yaml

    done = run_cli(f"method={method}", "modelpool=clip_vision", "--cfg", "job", cwd=tmp_path)
    found = yaml.safe_load(done.out)["method"]
    assert {key: found[key] for key in expected} == expected


# Spectra


@pytest.mark.parametrize("method", [TSVMAlgorithm, IsoCAlgorithm, IsoCTSAlgorithm])
def test_excluded_matrices_are_averaged_as_all_that_is_no_matrix(method, modelpool):
    merged = state_of(method(exclude_keys=[FC1]), modelpool)
    for name in (FC1, "embeddings.patch_embedding.weight", "post_layernorm.weight"):
        torch.testing.assert_close(merged[name], average_of(modelpool, name))
    for name in (QUERY, "embeddings.position_embedding.weight"):
        assert not torch.allclose(merged[name], average_of(modelpool, name), atol=1e-3)


def test_weights_of_tasks_must_be_as_many(modelpool):
    with pytest.raises(ConfigError, match="`alpha` has 3 numbers for 2 models"):
        TSVMAlgorithm(alpha=[1, 2, 3]).run(modelpool)
    one, both = (state_of(TSVMAlgorithm(alpha=a), modelpool) for a in ([1, 0], [1, 1]))
    assert differing(one, both) == set(one)


def test_more_tasks_than_singular_values_are_refused(pool_dir):
    models: dict[str, Any] = {"_pretrained_": random_tower(0)} | {f"t{n}": random_tower(n) for n in range(1, 7)}
    pool = CLIPVisionModelPool(models)  # five position embeddings
    with pytest.raises(
        ConfigError, match=r"`embeddings.position_embedding.weight` of shape \(5, 16\) has fewer than 6"
    ):
        TSVMAlgorithm().check(pool)
    TSVMAlgorithm(exclude_keys=["embeddings.position_embedding.weight"]).run(pool)
    for method in (IsoCAlgorithm(), IsoCTSAlgorithm()):
        assert method.run(pool)


def test_single_task_models_are_refused_with_a_reason():
    with pytest.raises(ConfigError, match=r"`return_single_task_models`=True.*makes one merged model"):
        TSVMAlgorithm(return_single_task_models=True)


# RegMean


def test_linear_layers_are_regressed_and_all_else_averaged(modelpool):
    merged, average = state_of(RegMeanAlgorithm(), modelpool), state_of(SimpleAverageAlgorithm(), modelpool)
    assert differing(merged, average) == linear_weights(modelpool.config())


def test_outputs_are_nearer_than_those_of_the_average(modelpool, taskpool):
    """What RegMean is made for, on the images that it looked at: the first layer's inputs are nearly the same."""
    merged = RegMeanAlgorithm(reduce_non_diagonal_ratio=1.0).run(modelpool)
    average = SimpleAverageAlgorithm().run(modelpool)
    losses = {}
    for label, model in (("regmean", merged), ("average", average)):
        total = 0.0
        for task in TASKS:
            tower, images = modelpool.load_model(task), taskpool.images(task)
            pixels = torch.stack([images[i][0] for i in range(len(images))])
            seen: list[Tensor] = []
            layer = "encoder.layers.0.self_attn.q_proj"
            own = dict(tower.named_modules())
            name = next(n for n in own if n.endswith(layer))
            handle = own[name].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            tower(pixel_values=pixels)
            handle.remove()
            theirs = module_state(model)[f"{layer}.weight"] - module_state(tower)[f"{layer}.weight"]
            total += (seen[0] @ theirs.T).square().mean().item()
        losses[label] = total
    assert losses["regmean"] < 0.95 * losses["average"]


def test_fewer_images_are_chosen_by_seed(modelpool):
    first, again, other = (
        state_of(RegMeanAlgorithm(num_regmean_examples=3, seed=seed), modelpool) for seed in (0, 0, 1)
    )
    assert_same_bits(first, again)
    assert differing(first, other) == linear_weights(modelpool.config())


def test_all_images_are_seen_once_whatever_the_batch(modelpool):
    first, second = (
        state_of(RegMeanAlgorithm(batch_size=size, seed=seed), modelpool) for size, seed in ((5, 0), (64, 1))
    )
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=1e-4, rtol=1e-4)


def test_labels_are_not_looked_at(pool_dir, tmp_path, modelpool):
    data = {}
    for task, names in TASKS.items():
        files = sorted((pool_dir / "images" / task).rglob("*.png"), key=lambda f: names.index(f.parent.name))
        (tmp_path / f"{task}.csv").write_text("path\n" + "".join(f"{file}\n" for file in files))
        data[task] = {"data": str(tmp_path / f"{task}.csv"), "classnames": list(names)}
    unlabelled = state_of(RegMeanAlgorithm(), module_pool(pool_dir, test_datasets=data))
    for name, tensor in state_of(RegMeanAlgorithm(), modelpool).items():
        torch.testing.assert_close(unlabelled[name], tensor, atol=1e-4, rtol=1e-4)


def test_images_of_another_split_may_be_looked_at(pool_dir, tmp_path):
    data = {}
    for task in TASKS:
        for split, source in (("test", task), ("train", "dogs" if task == "cats" else "cats")):
            folder = tmp_path / task / split
            for place, file in enumerate(sorted((pool_dir / "images" / source).rglob("*.png"))):
                target = folder / ("a", "b")[place % 2] / f"{place}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.open(file).save(target)
        data[task] = str(tmp_path / task)
    pool = module_pool(pool_dir, test_datasets=data)
    method = RegMeanAlgorithm(tta_split="train")
    other = state_of(method, pool)
    assert differing(other, state_of(RegMeanAlgorithm(), pool)) == linear_weights(pool.config())
    assert {task: origin["split"] for task, origin in method.adapted_on.items()} == dict.fromkeys(TASKS, "train")


def test_images_are_needed(pool_dir, taskpool):
    with pytest.raises(ConfigError, match="`test_datasets`"):
        RegMeanAlgorithm().run(module_pool(pool_dir, test_datasets=None))
    assert RegMeanAlgorithm().run(module_pool(pool_dir, test_datasets=None), taskpool)
    with pytest.raises(DataError, match="tta_split"):
        RegMeanAlgorithm(tta_split="validation").check(module_pool(pool_dir), taskpool)


@pytest.mark.parametrize("pattern", [r"encoder\.layers\.0\.", r"vision_model\.encoder\.layers\.0\."])
def test_excluded_parameters_stay_pretrained(modelpool, pattern):
    merged = state_of(RegMeanAlgorithm(exclude_param_names_regex=[pattern]), modelpool)
    pretrained, plain = modelpool.state("_pretrained_"), state_of(RegMeanAlgorithm(), modelpool)
    excluded = {name for name in merged if name.startswith("encoder.layers.0.")}
    assert {name for name in merged if torch.equal(merged[name], pretrained[name])} == excluded
    assert differing(merged, plain) == excluded


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weight_transpose": False}, r"`weight_transpose`=False is for models that keep weights as \(in, out\)"),
        ({"exclude_param_names_regex": ["("]}, r"`exclude_param_names_regex` has '\(', which is no regular expression"),
        ({"dataloader_kwargs": {"batch_sise": 3}}, r"`dataloader_kwargs\.batch_sise`.* did you mean `batch_size`"),
        ({"dataloader_kwargs": {"batch_size": 0}}, r"`dataloader_kwargs\.batch_size`=0 is not a possible number"),
        ({"dataloader_kwargs": {"shuffle": True}}, r"`dataloader_kwargs\.shuffle` is not an option here"),
        ({"num_regmean_examples": 0}, r"`num_regmean_examples`=0"),
        ({"reduce_non_diagonal_ratio": 1.5}, r"`reduce_non_diagonal_ratio`=1\.5"),
    ],
)
def test_impossible_options_are_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        RegMeanAlgorithm(**options)


def test_an_expression_that_matches_nothing_is_refused(modelpool):
    with pytest.raises(ConfigError, match=r"'mlp', which no name of a tensor begins with"):
        RegMeanAlgorithm(exclude_param_names_regex=["mlp"]).check(modelpool)


def test_batch_size_has_two_places():
    assert RegMeanAlgorithm(batch_size=8).loading == {"batch_size": 8, "num_workers": 0}
    assert RegMeanAlgorithm(batch_size=8, dataloader_kwargs={"batch_size": 4}).loading["batch_size"] == 4


def test_images_come_in_batches_of_the_size_asked_for(modelpool, monkeypatch):
    sizes: list[int] = []
    forward = RegMeanAlgorithm._images

    def noted(self: RegMeanAlgorithm, *args: Any) -> Any:
        for pixels in forward(self, *args):
            sizes.append(len(pixels))
            yield pixels

    monkeypatch.setattr(RegMeanAlgorithm, "_images", noted)
    RegMeanAlgorithm(num_regmean_examples=7, dataloader_kwargs={"batch_size": 3}).run(modelpool)
    assert sizes == [3, 3, 1] * 2


# Runs


def test_a_static_method_computes_where_the_fabric_is(modelpool):
    """Python without a Fabric takes what the machine has; with one, its device."""
    from fusion_merge.adaptation.runtime import make_fabric

    fabric = make_fabric(accelerator="cpu")
    for method in (TSVMAlgorithm(), RegMeanAlgorithm()):
        assert isinstance(method, StaticMethod)
        given = tensors_of(method.run(modelpool, None, fabric))
        assert {t.device.type for t in given.values()} == {"cpu"}
        assert_same_bits(given, tensors_of(method.run(modelpool)))


def test_merged_towers_are_saved_as_plain_ones(pool_dir, tmp_path):
    from runs import own_pool
    from transformers import CLIPVisionModel

    arguments = [*own_pool(pool_dir), "method=regmean", "baselines=[]", "merged_model_save_path=merged"]
    done = run_cli(*arguments, cwd=tmp_path)
    assert done.code == 0, done.err
    tower = CLIPVisionModel.from_pretrained(Path(tmp_path) / "merged")
    assert sum(p.numel() for p in tower.parameters()) > 0
