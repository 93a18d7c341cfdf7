"""The published pools and tasks: what the presets are made of, and that all of them compose and can be made offline.

Ids and lists are written out here a second time, from the papers and the model cards, so that a slip in either shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError
from runs import assert_refused, own_pool, run_cli

from fusion_merge import CLIPVisionModelPool, presets
from fusion_merge.errors import DataError
from fusion_merge.help import shown_presets
from fusion_merge.pools.prompts import prompt_names, prompt_set
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool, TaskPool
from fusion_merge.presets import LONG_PATHS, preset_names
from fusion_merge.program import FusionProgram
from fusion_merge.registry import object_from_config
from fusion_merge.schema import CORRUPTIONS, corrupted_split, register_schema

B32, B16, L14 = "clip-vit-base-patch32", "clip-vit-base-patch16", "clip-vit-large-patch14"
TA8 = ["sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"]
TALL14 = [*TA8, "oxford_flowers102", "pcam", "fer2013", "oxford-iiit-pet", "stl10", "cifar100"]
TALL20 = [*TALL14, "cifar10", "food101", "fashion_mnist", "emnist_letters", "kmnist", "rendered-sst2"]
LISTS = {"TA8": TA8} | {f"TALL{n}": TALL20[:n] for n in (10, 12, 14, 16, 18, 20)}
ROBUSTNESS = ["stanford-cars", "eurosat", "resisc45", "gtsrb"]
SMALL = {
    "svhn_and_mnist": ["svhn", "mnist"],
    "sun397_and_cars": ["sun397", "stanford-cars"],
    "sun397_and_dtd": ["sun397", "dtd"],
    "cars_and_dtd": ["stanford-cars", "dtd"],
    "sun397_cars_and_dtd": ["sun397", "stanford-cars", "dtd"],
}
MERGED = {
    "generalization_exp1": ["sun397", "stanford-cars", "resisc45", "dtd", "svhn", "gtsrb"],
    "generalization_exp2": ["sun397", "stanford-cars", "gtsrb", "eurosat", "dtd", "mnist"],
}
DATA = {
    "sun397": ("tanganke/sun397", 397, 2),
    "stanford-cars": ("tanganke/stanford_cars", 196, 8),
    "resisc45": ("tanganke/resisc45", 45, 18),
    "eurosat": ("tanganke/eurosat", 10, 3),
    "svhn": ({"path": "ufldl-stanford/svhn", "name": "cropped_digits"}, 10, 1),
    "gtsrb": ("tanganke/gtsrb", 43, 3),
    "mnist": ("ylecun/mnist", 10, 1),
    "dtd": ("tanganke/dtd", 47, 8),
    "oxford_flowers102": ("dpdl-benchmark/oxford_flowers102", 102, 1),
    "pcam": ("1aurent/PatchCamelyon", 2, 1),
    "fer2013": ("clip-benchmark/wds_fer2013", 7, 6),
    "oxford-iiit-pet": ("timm/oxford-iiit-pet", 37, 1),
    "stl10": ("tanganke/stl10", 10, 2),
    "cifar100": ("tanganke/cifar100", 100, 18),
    "cifar10": ("tanganke/cifar10", 10, 18),
    "food101": ("ethz/food101", 101, 1),
    "fashion_mnist": ("zalando-datasets/fashion_mnist", 10, 2),
    "emnist_letters": ("tanganke/emnist_letters", 26, 1),
    "kmnist": ("tanganke/kmnist", 10, 1),
    "rendered-sst2": ("nateraw/rendered-sst2", 2, 1),
}
COLUMNS = {
    "fer2013": {"image_column": "jpg", "label_column": "cls"},
    "oxford-iiit-pet": {"label_column": "label"},
}
Compose = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _hydra() -> Iterator[None]:
    register_schema()
    yield
    GlobalHydra.instance().clear()


def composed(*overrides: str, config: str = "config") -> dict[str, Any]:
    """The configuration of a command line, as plain values."""
    with initialize_config_module("fusion_merge.config", version_base="1.3"):
        found: Any = OmegaConf.to_container(compose(config, overrides=list(overrides)), resolve=True)
    return found


@pytest.fixture(scope="module")
def preset() -> Compose:
    """The configuration of one preset of a group; some are composed at a time, which is much quicker."""
    ConfigStore.instance().store(name="bare", node={"fast_dev_run": False, "corruption": "spatter"})
    known: dict[str, dict[str, Any]] = {}

    def find(group: str, name: str, names: list[str]) -> dict[str, Any]:
        if f"{group}/{name}" not in known:
            size = 2 if group == "modelpool" else 8
            start = names.index(name) // size * size
            some = names[start : start + size]
            found = composed(*(f"+{group}@pool{i}={n}" for i, n in enumerate(some)), config="bare")
            known.update({f"{group}/{n}": found[f"pool{i}"] for i, n in enumerate(some)})
        return known[f"{group}/{name}"]

    return find


def spec(task: str, **more: str) -> dict[str, Any]:
    return {"data": DATA[task][0], "prompts": task} | COLUMNS.get(task, {}) | more


def specs(tasks: list[str], **more: str) -> dict[str, Any]:
    return {task: spec(task, **more) for task in tasks}


def ids(arch: str, tasks: list[str], suffix: str = "") -> dict[str, str]:
    return {"_pretrained_": f"openai/{arch}"} | {task: f"tanganke/{arch}_{task}{suffix}" for task in tasks}


Pool = tuple[dict[str, str], dict[str, Any], dict[str, Any]]


def published() -> dict[str, Pool]:
    """Models, images to fine-tune on, and images to adapt and score on, of every published model pool."""
    pools: dict[str, Pool] = {}
    for arch in (B32, B16, L14):
        for name, tasks in LISTS.items():
            if arch == B32 or name in ("TA8", "TALL14", "TALL20"):
                pools[f"{arch}_{name}"] = (ids(arch, tasks), specs(tasks), specs(tasks))
            if name in ("TA8", "TALL14", "TALL20"):
                pools[f"{arch}_{name}_model_only"] = (ids(arch, tasks), {}, {})
        pools[f"{arch}_individual"] = (ids(arch, []), {}, {})
    for name, tasks in {**SMALL, **MERGED, "robustness_clean": ROBUSTNESS}.items():
        pools[f"{B32}_{name}"] = (ids(B32, tasks), specs(tasks), specs(tasks))
    corrupted = specs(ROBUSTNESS, split="spatter")
    pools[f"{B32}_robustness_corrupted"] = (ids(B32, ROBUSTNESS), {}, corrupted)
    pools[f"{B32}_mtl"] = (ids(B32, []), specs(TA8), {})
    finetuned = ids(B32, []) | {"finetuned": f"tanganke/{B32}_stanford-cars"}
    pools[f"{B32}_single_finetuned"] = (finetuned, {}, {})
    pools[f"{B16}_TA8_lora"] = (ids(B16, TA8, "_lora-16"), specs(TA8), specs(TA8))
    pools[f"{B16}_individual_lora"] = (ids(B16, ["sun397"], "_lora-16"), {}, {})
    return pools


PUBLISHED = published()
OWN_TASKS = {name for name in PUBLISHED if name.endswith(("_robustness_clean", "_robustness_corrupted"))} | {
    f"{B32}_svhn_and_mnist",
    f"{B32}_generalization_exp1",
    f"{B32}_generalization_exp2",
}
"""Model pools with a task pool of their name."""

EMBEDDED = ("tiny8", "tiny8_hard", "tiny20")


# Model pools


def test_there_are_no_other_model_pools():
    assert {*PUBLISHED, "clip_vision", *EMBEDDED} == set(preset_names("modelpool"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_model_pool_has_the_published_models_and_images_and_can_be_made_offline(preset, name):
    models, train, test = PUBLISHED[name]
    config = preset("modelpool", name, list(PUBLISHED))
    assert list(config["models"].items()) == list(models.items())
    assert list(config["train_datasets"].items()) == list(train.items())
    assert list(config["test_datasets"].items()) == list(test.items())
    pool = object_from_config(config, "modelpool", CLIPVisionModelPool)
    assert pool.base_model == models["_pretrained_"]
    assert pool.model_names == list(models)[1:]


def test_a_list_of_tasks_may_say_where_it_stands_itself(monkeypatch):
    lists = {"two": "defaults: [one, _self_, {task@_here_: [b]}]", "one": "defaults: [{task@_here_: [a]}, _self_]"}
    monkeypatch.setattr(presets, "_text", lambda _group, name: lists[name])
    assert presets._listed("two") == ["a", "b"]


def test_every_list_is_the_one_before_and_two_tasks_more():
    names = list(LISTS)
    for before, name in pairwise(names):
        preset = yaml.safe_load(files("fusion_merge.config").joinpath("dataset", f"{name}.yaml").read_text())
        first, more = preset["defaults"]
        assert first == before
        assert next(iter(more.values())) == LISTS[name][len(LISTS[before]) :]


def test_models_have_no_lists_of_their_own():
    folder = Path(str(files("fusion_merge.config"))) / "model"
    listed = [file for file in folder.rglob("*.yaml") if len(yaml.safe_load(file.read_text()).get("defaults", [])) > 2]
    assert listed == []


@pytest.mark.parametrize("folder", ["dataset", "model"])
def test_every_id_is_written_once(folder):
    texts = [file.read_text() for file in sorted((Path(str(files("fusion_merge.config"))) / folder).rglob("*.yaml"))]
    words = [word for text in texts for word in text.replace(",", " ").split() if "/" in word and word[0] != "/"]
    hub = [word for word in words if word.startswith(("tanganke/", "openai/"))]
    assert len(hub) == len(set(hub)) > 10


# Task pools


def scored() -> dict[str, dict[str, Any]]:
    """What every published task pool scores."""
    lists = {f"clip-vit-classification_{name}": specs(tasks) for name, tasks in LISTS.items()}
    variants = [f"clip-vit-classification_TA8_{v}" for v in ("val", "B16", "L14")]
    variants += [f"clip_{m}_clip-vit-classification_TA8" for m in ("rankone_wemoe", "sparse_wemoe")]
    variants += [f"{B32}_generalization_exp{i}" for i in (1, 2)]
    return {
        **lists,
        **{name: specs(TA8) for name in variants},
        **{f"clip-vit-single-task_{task}": specs([task]) for task in TALL20},
        f"{B32}_svhn_and_mnist": specs(["svhn", "mnist"]),
        f"{B32}_robustness_clean": specs(ROBUSTNESS),
        f"{B32}_robustness_corrupted": specs(ROBUSTNESS, split="spatter"),
    }


SCORED = scored()


def test_there_are_no_other_task_pools():
    assert {*SCORED, "clip_vision", "dummy", *EMBEDDED, "tiny8_generalization", "tiny8_unseen"} == set(
        preset_names("taskpool")
    )


@pytest.mark.parametrize("name", SCORED)
def test_task_pool_scores_the_published_tasks_and_can_be_made_offline(preset, name):
    config = preset("taskpool", name, list(SCORED))
    assert list(config["test_datasets"].items()) == list(SCORED[name].items())
    assert config["base_model"] == {"B16": f"openai/{B16}", "L14": f"openai/{L14}"}.get(name.rpartition("_")[2])
    assert config["split"] == ("held_out" if name.endswith("_val") else None)
    assert object_from_config(config, "taskpool", TaskPool).task_names == list(SCORED[name])


@pytest.mark.parametrize("name", [*PUBLISHED, *EMBEDDED, "clip_vision"])
def test_model_pool_has_a_task_pool_by_default(name):
    """Either that of its name, or the one that takes the model pool's own images."""
    own = name in OWN_TASKS or name in (*EMBEDDED, "clip_vision")
    assert (name in preset_names("taskpool")) == own
    stored = ConfigStore.instance().load(f"taskpool/CLIPVisionModelPool/{name}.yaml").node
    assert stored == {"defaults": [f"/taskpool/{name if own else 'clip_vision'}@_here_"]}
    if not own:
        assert ConfigStore.instance().load(f"taskpool/{name}.yaml").node == stored


@pytest.mark.parametrize(
    ("pool", "tasks"),
    [
        (f"{B32}_TALL10", LISTS["TALL10"]),
        (f"{B32}_generalization_exp2", TA8),
        (f"{B16}_TA8_lora", TA8),
        (f"{B32}_robustness_corrupted", ROBUSTNESS),
    ],
)
def test_model_pool_alone_is_scored_on_its_own_tasks(tmp_path, pool, tasks):
    config = composed("method=dummy", f"modelpool={pool}", "corruption=spatter")
    program = FusionProgram(config, tmp_path)
    assert isinstance(program.taskpool, CLIPVisionModelTaskPool)
    assert program.taskpool.task_names == tasks
    long = composed("method=dummy", f"modelpool=CLIPVisionModelPool/{pool}", "corruption=spatter")
    assert (long["modelpool"], long["taskpool"]) == (config["modelpool"], config["taskpool"])


# Long paths, and the commands that fusion_bench documents


@pytest.mark.parametrize("group", LONG_PATHS)
def test_every_preset_has_its_long_path(group):
    for name in preset_names(group):
        stored = ConfigStore.instance().load(f"{group}/{LONG_PATHS[group]}/{name}.yaml").node
        assert stored == {"defaults": [f"/{group}/{name}@_here_"]}


DOCUMENTED = [
    "method=rankone_moe/rankone_moe method.rank_k=32 method.select_k=-1 method.init_lambda=0.3 method.lr=0.0001 "
    "method.max_steps=1000 method.batch_size=16 modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 "
    "taskpool=CLIPVisionModelTaskPool/clip-vit-classification_TA8",
    "method=weight_ensembling_moe method.name=clip_weight_ensembling_moe method.use_grad_accumulate=false "
    "method.save_checkpoint=outputs/wemoe.ckpt modelpool=clip-vit-base-patch32_TA8 "
    "taskpool=clip-vit-classification_TA8",
    "print_config=false method=weight_ensembling_moe method.checkpoint=outputs/wemoe.ckpt method.batch_size=4 "
    "method.devices=4 modelpool=clip-vit-large-patch14_TA8 taskpool=dummy",
    "method=wemoe/sparse_weight_ensembling_moe method.name=sparse_clip_weight_ensembling_moe method.tv_prune_ratio=0.9 "
    "method.use_grad_accumulate=false fast_dev_run=false "
    "modelpool=CLIPVisionModelPool/clip-vit-base-patch32_generalization_exp1 "
    "taskpool=CLIPVisionModelTaskPool/clip-vit-classification_TA8 report_save_path=outputs/ratio_0_9.json",
    "method=rankone_moe/rankone_moe modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8 "
    "taskpool=CLIPVisionModelTaskPool/clip_rankone_wemoe_clip-vit-classification_TA8",
    "method=task_arithmetic method.scaling_factor=0.3 modelpool=clip-vit-base-patch32_robustness_clean "
    "taskpool=clip-vit-base-patch32_robustness_clean report_save_path=outputs/clean.json",
    "--config-name clip-vit-base-patch32_robustness_corrupted corruption=contrast method=task_arithmetic",
    "--config-name clip-vit-base-patch32_robustness_corrupted corruption=gaussian_noise method=simple_average "
    "modelpool=CLIPVisionModelPool/clip-vit-base-patch32_robustness_corrupted "
    "taskpool=clip-vit-base-patch32_robustness_corrupted",
    "method=clip_finetune modelpool=CLIPVisionModelPool/clip-vit-base-patch32_mtl taskpool=dummy",
    "method=simple_average modelpool=clip-vit-base-patch32_TA8.yaml",
    "method=dummy modelpool=CLIPVisionModelPool/clip-vit-base-patch32_individual "
    "modelpool.models._pretrained_=tanganke/clip-vit-base-patch32_mnist taskpool=clip-vit-single-task_mnist",
]


@pytest.mark.parametrize("command", DOCUMENTED)
def test_documented_command_composes(tmp_path, command):
    done = run_cli(*command.split(), "--cfg", "job", "--resolve", cwd=tmp_path)
    assert done.code == 0, done.err
    config = yaml.safe_load(done.out)
    FusionProgram(config, tmp_path / "out")
    assert config["modelpool"]["models"]["_pretrained_"].startswith("openai/") or "individual" in command


def test_long_paths_may_be_swept(tmp_path):
    pools = ",".join(f"CLIPVisionModelPool/{pool}" for pool in (f"{B32}_individual", f"{B16}_individual"))
    done = run_cli(
        "-m",
        "method=dummy",
        f"modelpool={pools}",
        "method.nam=x",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
        cwd=tmp_path / "work",
    )
    assert_refused(done, tmp_path / "work", "`method.nam` is not an option", "did you mean `name`")


# What is refused


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["modelpool=clip-vit-base-patch32_TA9"], ["`modelpool=clip-vit-base-patch32_TA9`", "patch32_TA8`?"]),
        (
            ["modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TAL20"],
            ["is not a preset; did you mean `CLIPVisionModelPool/clip-vit-base-patch32_TALL20`"],
        ),
        (
            ["taskpool=CLIPVisionModelTaskPool/clip-vit-clasification_TA8"],
            ["did you mean `CLIPVisionModelTaskPool/clip-vit-classification_TA8`"],
        ),
        ([f"modelpool={B32}_robustness_corrupted", "method=dummy"], ["needs a `corruption`", "gaussian_noise"]),
        (
            [f"modelpool={B32}_robustness_corrupted", "method=dummy", "corruption=gausian_noise"],
            ["`corruption`='gausian_noise'", "did you mean `gaussian_noise`"],
        ),
        ([f"modelpool={L14}_TALL20_model_only", "method=dummy"], ["nothing to score on", "`taskpool=NAME`", "dummy"]),
        ([f"modelpool={B32}_individual", "method=dummy"], ["nothing to score on"]),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, arguments, texts):
    assert_refused(run_cli(*arguments, cwd=tmp_path), tmp_path, *texts)


def test_corruptions_are_the_seven_of_the_protocol():
    assert [corrupted_split(name) for name in CORRUPTIONS] == sorted(
        ["contrast", "gaussian_noise", "impulse_noise", "jpeg_compression", "motion_blur", "pixelate", "spatter"]
    )
    with pytest.raises(InterpolationResolutionError, match="needs a `corruption`"):
        composed(f"modelpool={B32}_robustness_corrupted")


# Own pools without a task pool


def test_own_images_in_the_model_pool_alone_are_scored(pool_dir, tmp_path):
    models = [argument for argument in own_pool(pool_dir) if argument.startswith("modelpool")]
    images = f"modelpool.test_datasets.cats={pool_dir / 'images' / 'cats'}"
    done = run_cli("method=wemoe", *models, images, "dry_run=true", cwd=tmp_path)
    assert done.code == 1
    assert "adaptation needs images of `dogs`" in done.err
    done = run_cli("method=task_arithmetic", *models, images, "dry_run=true", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "cats (12)" in done.out


MODELS = {"_pretrained_": "pretrained", "cats": "cats", "dogs": "dogs"}


@pytest.mark.parametrize("mine", ["mine", "mine,'mine'"])
def test_own_preset_of_a_model_pool_needs_none_for_its_tasks(pool_dir, tmp_path, mine):
    folder = tmp_path / "own" / "modelpool"
    folder.mkdir(parents=True)
    preset = {
        "defaults": ["clip_vision"],
        "models": {name: str(pool_dir / model) for name, model in MODELS.items()},
        "test_datasets": {"cats": str(pool_dir / "images" / "cats")},
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump(preset))
    sweep = ["-m", f"hydra.sweep.dir={tmp_path / 'sweep'}"] if "," in mine else []
    arguments = ["--config-dir", str(tmp_path / "own"), *sweep, f"modelpool={mine}", "method=simple_average"]
    done = run_cli(*arguments, "dry_run=true", cwd=tmp_path / "work")
    assert done.code == 0, done.err
    assert "cats (12)" in done.out


# Prompts, and what is shown


@pytest.mark.parametrize("task", TALL20)
def test_prompt_set_has_the_published_number_of_classes_and_templates(task):
    found = prompt_set(task)
    assert (len(found.classnames), len(found.templates)) == DATA[task][1:]
    assert all(isinstance(text, str) and text.strip() == text != "" for text in found.classnames)
    assert len(set(found.classnames)) == len(found.classnames)
    assert all(template.count("{}") == 1 for template in found.templates)


def test_there_are_no_other_prompt_sets():
    assert prompt_names() == sorted(TALL20)


def test_unknown_prompt_set_names_the_nearest():
    with pytest.raises(DataError, match=r"`prompts`='cifar11' is not a prompt set; did you mean `cifar10`"):
        prompt_set("cifar11")


def test_help_shows_a_preset_beside_the_family_that_begins_with_its_name(monkeypatch):
    names = ["pool", *(f"pool_{k}" for k in "abcd")]
    monkeypatch.setattr("fusion_merge.help.preset_names", lambda *_: names)
    lines = [line.removeprefix("modelpool").strip() for line in shown_presets().splitlines()]
    assert {"pool", "pool_{a, b, c, d}"} <= {*lines}


@pytest.mark.parametrize("columns", [64, 80, 500])
def test_help_shows_every_preset_in_families_of_bearable_width(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = shown_presets()
    *lines, paths = shown.splitlines()
    assert max(map(len, lines)) <= min(columns, 120)
    assert len(lines) < 65
    assert "modelpool=CLIPVisionModelPool/NAME" in paths
    for name in [*preset_names("modelpool"), *preset_names("taskpool"), *preset_names("method")]:
        family, _, member = name.partition("_")
        assert name in shown or (f"{family}_{{" in shown and member in shown)
