"""fusion_bench's pools, algorithms and prompts in our hands; tests/e2e/test_fusion_bench.py runs its program itself."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import upstream
from lightning_fabric import Fabric
from omegaconf import OmegaConf
from runs import assert_same_bits, tensors_of
from transformers import CLIPModel, CLIPProcessor, CLIPVisionModel

import fusion_merge
from fusion_merge import (
    MergedCLIPVisionModel,
    RankOneMoEAlgorithm,
    SimpleAverageAlgorithm,
    TaskArithmeticAlgorithm,
    WEMoEAlgorithm,
)
from fusion_merge.errors import ConfigError, DataError, FusionMergeError
from fusion_merge.pools.foreign import own_pool

QUICK = {"max_steps": 3, "batch_size": 4}
RANKONE = "fusion_merge.methods.rankone_moe.RankOneMoEAlgorithm"


@pytest.fixture(scope="module")
def plugin() -> Any:
    return upstream.import_plugin()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return upstream.write_images(tmp_path_factory.mktemp("images"), 24)


@pytest.fixture
def foreign(plugin, images) -> Any:
    return upstream.foreign_pool(images)


# Our methods on its pools


@pytest.mark.parametrize(
    "method",
    [RankOneMoEAlgorithm(rank_k=4, **QUICK), WEMoEAlgorithm(**QUICK), TaskArithmeticAlgorithm(scaling_factor=0.2)],
    ids=lambda method: method.method_name,
)
def test_method_makes_the_same_model_of_a_pool_of_fusion_bench_as_of_ours(method, foreign, images):
    theirs = tensors_of(method.run(foreign))
    assert_same_bits(theirs, tensors_of(method.run(upstream.own_pool(images))))


def test_check_takes_a_pool_of_fusion_bench_too(foreign):
    SimpleAverageAlgorithm().check(foreign)  # which it does not override
    with pytest.raises(ConfigError, match=r"`rank_k`=300 is not in 1-64"):
        RankOneMoEAlgorithm(rank_k=300).check(modelpool=foreign)


def test_pool_of_ours_is_left_as_it_is(modelpool):
    assert own_pool(modelpool) is modelpool


@pytest.mark.parametrize("pool", [None, {"_pretrained_": "a"}, SimpleNamespace(model_names=[])])
def test_what_is_no_model_pool_is_refused(pool):
    with pytest.raises(ConfigError, match=r"`modelpool` is a \w+, not a model pool"):
        SimpleAverageAlgorithm().run(pool)


def test_pool_of_ours_imports_nothing_of_fusion_bench(images):
    code = f"""if True:
        import sys
        sys.path[:0] = {[str(Path(upstream.__file__).parent), str(Path(fusion_merge.__file__).parents[1])]!r}
        from pathlib import Path
        from fusion_merge import SimpleAverageAlgorithm
        import upstream
        SimpleAverageAlgorithm().run(upstream.own_pool(Path({str(images)!r})))
        print([name for name in sys.modules if name.partition(".")[0] == "fusion_bench"])
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# What becomes of its pools


def test_models_are_read_where_they_are_and_only_when_they_are_needed(foreign):
    pool = own_pool(foreign)
    assert pool.model_names == list(upstream.TASKS)
    assert {name: pool.describe(name) for name in pool.all_model_names} == upstream.sources()
    assert pool._states == {}
    pool.check(min_models=3)


@pytest.mark.parametrize("form", ["path", "config", "keyword of its own", "module"])
def test_each_form_of_a_model_gives_the_same_weights(form, plugin, images):
    place = upstream.sources()["mnist"]
    call = {"_target_": "transformers.CLIPVisionModel.from_pretrained", "pretrained_model_name_or_path": place}
    forms = {
        "path": place,
        "config": call,
        "keyword of its own": {**call, "low_cpu_mem_usage": True},
        "module": CLIPVisionModel.from_pretrained(place),
    }
    models: dict[str, Any] = upstream.sources() | {"mnist": forms[form]}
    foreign = upstream.foreign_pool(images, models)
    assert_same_bits(dict(own_pool(foreign).state("mnist")), dict(upstream.own_pool(images).state("mnist")))


def test_modules_of_the_pool_are_not_changed(plugin, images):
    models = {name: CLIPVisionModel.from_pretrained(place) for name, place in upstream.sources().items()}
    before = {name: tensors_of(model) for name, model in models.items()}
    TaskArithmeticAlgorithm().run(upstream.foreign_pool(images, models))
    for name, model in models.items():
        assert_same_bits(before[name], tensors_of(model))


def test_images_and_prompts_are_those_of_fusion_bench(foreign, images):
    from fusion_bench.tasks.clip_classification import get_classnames_and_templates

    tasks = own_pool(foreign).task_pool()
    for name in upstream.TASKS:
        classnames, templates = get_classnames_and_templates(name)
        task = tasks.task(name)
        assert task.classnames == tuple(classnames)
        assert [[t.replace("{}", c) for t in task.templates] for c in classnames] == [
            [template(c) for template in templates] for c in classnames
        ]
        assert len(task) == 24


def test_pixels_are_those_that_fusion_bench_scores(foreign):
    from fusion_bench.dataset.image_dataset import ImageClassificationDataset

    tasks = own_pool(foreign).task_pool()
    theirs = ImageClassificationDataset(foreign.load_test_dataset("svhn"), foreign.load_processor())
    ours = tasks.images("svhn")
    for index in range(5):
        pixels, label = theirs[index]
        assert torch.equal(ours[index][0], pixels)
        assert tasks.task("svhn").item(index)[1] == label


def test_heads_are_those_that_fusion_bench_scores_with(foreign):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fusion_bench.models.hf_clip import HFCLIPClassifier
    from fusion_bench.tasks.clip_classification import get_classnames_and_templates

    place = upstream.sources()["_pretrained_"]
    clip = CLIPModel.from_pretrained(place, dtype=torch.float32)
    classifier = HFCLIPClassifier(clip, CLIPProcessor.from_pretrained(place))
    tasks = own_pool(foreign).task_pool()
    for name in upstream.TASKS:
        classifier.set_classification_task(*get_classnames_and_templates(name))
        torch.testing.assert_close(tasks.head(name).embeddings, classifier.zeroshot_weights, atol=1e-6, rtol=0)


def test_class_names_belong_to_labels_by_position_as_in_fusion_bench(plugin, images):
    """Even where the data call their labels by those very names in another order."""
    from datasets import ClassLabel

    data = own_pool(upstream.foreign_pool(images)).task_pool().task("mnist").data
    names = ["1", "0", *map(str, range(2, 10))]
    turned = data.cast_column("label", ClassLabel(names=names))
    pool = upstream.foreign_pool(images, test_datasets={"mnist": turned})
    assert own_pool(pool).task_pool().task("mnist").classnames == tuple("0123456789")


@pytest.mark.parametrize("wrong", [{"by_position": "yes"}, {"by_position": True}], ids=["no truth value", "no names"])
def test_by_position_needs_a_list_of_names(wrong, images):
    pool = upstream.own_pool(images, test_datasets={"mnist": {"data": str(images / "mnist"), **wrong}})
    with pytest.raises(DataError, match=r"`by_position`.* of `mnist`"):
        pool.task_pool().task("mnist")


def test_every_task_that_fusion_bench_knows_has_templates_that_can_be_adapted_with(plugin):
    from fusion_bench.tasks.clip_classification import CLIPTemplateFactory

    specs = {name: plugin._task(name, "somewhere") for name in CLIPTemplateFactory.get_available_datasets()}
    without = {name for name, spec in specs.items() if "templates" not in spec}
    assert without <= {"mango-leaf-disease"}  # whose file is not in the package
    assert all("{}" in template for name in specs.keys() - without for template in specs[name]["templates"])


def test_template_that_changes_the_name_is_refused(plugin):
    with pytest.raises(ConfigError, match=r"template of task `cats` makes 'a tabby' of 'Tabby'"):
        plugin._templates("cats", [lambda c: f"a {c.lower()}"], ["Tabby"])


def test_task_that_fusion_bench_does_not_know_keeps_its_own_names(plugin, images):
    pool = upstream.foreign_pool(
        images, test_datasets=OmegaConf.create({"mine": upstream.datasets_config(images)["svhn"]})
    )
    task = own_pool(pool).task_pool().task("mine")
    assert (task.classnames, task.templates) == (tuple("0123456789"), ("a photo of a {}.",))


def test_data_set_by_its_name_alone_is_the_split_of_that_name(plugin, images):
    pool = upstream.foreign_pool(images, test_datasets={"svhn": "owner/svhn"}, train_datasets={"svhn": "owner/svhn"})
    converted = own_pool(pool)
    tables = {"test": converted.test_datasets, "train": converted.train_datasets}
    for split, table in tables.items():
        assert (table["svhn"]["data"], table["svhn"]["split"]) == ("owner/svhn", split)


def test_pool_without_images_is_adapted_on_those_of_the_task_pool(plugin, images):
    algorithm = plugin.FusionMergeAlgorithm("wemoe", **QUICK)
    pool = upstream.foreign_pool(images, test_datasets=None)
    with pytest.raises(ConfigError, match="adaptation needs images of `mnist`"):
        algorithm.run(pool)
    scored = SimpleNamespace(_test_datasets=OmegaConf.create(upstream.datasets_config(images)))
    algorithm._program = SimpleNamespace(taskpool=scored)
    expected = WEMoEAlgorithm(**QUICK).run(upstream.own_pool(images))
    assert_same_bits(tensors_of(algorithm.run(pool)), tensors_of(expected))


def test_pool_of_another_kind_is_refused_with_what_to_choose(plugin):
    from fusion_bench.modelpool import BaseModelPool

    with pytest.raises(ConfigError, match=r"BaseModelPool of fusion_bench.*modelpool=CLIPVisionModelPool"):
        SimpleAverageAlgorithm().run(BaseModelPool({"_pretrained_": torch.nn.Linear(1, 1)}))


# Our methods as its algorithms


def test_algorithm_returns_what_its_task_pools_score(plugin, foreign):
    model = plugin.FusionMergeAlgorithm(RANKONE, rank_k=4, **QUICK).run(foreign)
    assert isinstance(model, MergedCLIPVisionModel)
    pixels = torch.rand(2, 3, 32, 32)
    assert model(pixels)[1].shape == (2, model.config.vision_config["hidden_size"])


def test_algorithm_computes_where_the_program_does(plugin, foreign):
    class Watched(Fabric):
        used = False

        def setup(self, *args: Any, **options: Any) -> Any:
            self.used = True
            return super().setup(*args, **options)

    algorithm = plugin.FusionMergeAlgorithm("wemoe", **QUICK)
    algorithm._fabric_instance = Watched(accelerator="cpu", devices=1)
    algorithm.run(foreign)
    assert algorithm._fabric_instance.used


def test_algorithm_is_made_again_from_its_yaml(plugin, tmp_path):
    algorithm = plugin.FusionMergeAlgorithm(RANKONE, rank_k=4, lr=1e-3, seed=None, _usage_="to try")
    algorithm.to_yaml(tmp_path / "method.yaml")
    again = plugin.FusionMergeAlgorithm.from_yaml(tmp_path / "method.yaml")
    assert isinstance(again.method, RankOneMoEAlgorithm)
    assert again.method.options() == algorithm.method.options() == RankOneMoEAlgorithm(rank_k=4, lr=1e-3).options()
    assert again.config == algorithm.config


@pytest.mark.parametrize(
    ("algorithm", "options", "message"),
    [
        ("wemo", {}, "method `wemo` is unknown; did you mean `wemoe`"),
        ("fusion_merge.methods.wemoe.Nothing", {}, "cannot be imported"),
        ("torch.nn.Linear", {}, "not a Method"),
        (RANKONE, {"rankk": 3}, "`method.rankk` is not an option.*did you mean `rank_k`"),
        (RANKONE, {"rank_k": "three"}, "`rank_k`='three'"),
        ("clip_finetune", {}, "does not merge models into one"),
        ("simple_ensemble", {}, "does not merge models into one tower"),
    ],
)
def test_algorithm_that_cannot_be_made_is_refused(plugin, algorithm, options, message):
    with pytest.raises(FusionMergeError, match=message):
        plugin.FusionMergeAlgorithm(algorithm, **options)


def test_state_of_a_finished_adaptation_is_forgotten(plugin, foreign, tmp_path):
    algorithm = plugin.FusionMergeAlgorithm("wemoe", cache_dir=str(tmp_path), save_every=1, **QUICK)
    algorithm.on_run_start()
    algorithm.run(foreign)
    assert list(tmp_path.glob("*.progress"))
    algorithm.on_run_end()
    assert not list(tmp_path.glob("*.progress"))
