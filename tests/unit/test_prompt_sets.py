"""Tasks with a published prompt set: `prompts: NAME` in a task's spec. And the held-out part of training images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from fusion_merge.errors import DataError
from fusion_merge.pools.datasets import make_task
from fusion_merge.pools.prompts import prompt_set
from fusion_merge.pools.reading import Purpose

MNIST = tuple("0123456789")
CIFAR10 = prompt_set("cifar10")


def images(labels: list[Any], feature: Any) -> Dataset:
    pictures = [PILImage.fromarray(np.full((4, 4), i, np.uint8)) for i in range(len(labels))]
    return Dataset.from_dict(
        {"image": pictures, "label": labels}, features=Features({"image": Image(), "label": feature})
    )


def unlabelled() -> Dataset:
    return images([0, 1], Value("int64")).remove_columns("label")


@pytest.mark.parametrize(
    "own",
    [
        pytest.param(list(MNIST), id="the same names"),
        pytest.param([str(9 - i) for i in range(10)], id="the same names for other labels"),
        pytest.param([f"digit {i}" for i in range(10)], id="other names"),
        pytest.param(["zero", "2", *"13456789"], id="some of the names at other places"),
        pytest.param(["a", "b", "c"], id="fewer names"),
        pytest.param(None, id="no names"),
    ],
)
def test_published_names_belong_to_labels_by_position_whatever_the_dataset_calls_them(own):
    data = images([0, 2, 1], ClassLabel(names=own) if own else Value("int64"))
    task = make_task("digits", {"data": data, "prompts": "mnist"})
    assert task.classnames == MNIST
    assert [task.item(i)[1] for i in range(3)] == [0, 2, 1]
    assert task.templates == ('a photo of the number: "{}".',)


def test_boolean_labels_have_published_names_too():
    task = make_task("pcam", {"data": images([True, False], Value("bool")), "prompts": "pcam"})
    assert [task.classnames[task.item(i)[1]] for i in range(2)] == [
        "lymph node containing metastatic tumor tissue",
        "lymph node",
    ]


def test_class_names_and_templates_beside_prompts_win_each_for_itself():
    data = images([0, 1], ClassLabel(names=["b", "a"]))
    named = make_task("x", {"data": data, "prompts": "cifar10", "classnames": ["a", "b"]})
    assert named.classnames == ("b", "a")  # matched by name, as without prompts
    assert named.templates == CIFAR10.templates
    worded = make_task("x", {"data": data, "prompts": "cifar10", "templates": ["my {}"]})
    assert (worded.classnames, worded.templates) == (CIFAR10.classnames, ("my {}",))
    nothing = make_task("x", {"data": data, "prompts": None, "classnames": None, "templates": []})
    assert (nothing.classnames, nothing.templates) == (("b", "a"), ("a photo of a {}.",))


@pytest.mark.parametrize("kind", ["folders", "words"])
def test_own_labels_are_matched_by_name(tmp_path, kind):
    spec = {"data": written(tmp_path, kind, ["ship", "cat", "dog"]), "prompts": "cifar10"}
    task = make_task("x", spec)
    assert task.classnames == ("cat", "dog", "ship")
    assert [task.classnames[task.item(i)[1]] for i in range(3)] == [Path(task.file_name(i)).stem for i in range(3)]


@pytest.mark.parametrize("kind", ["folders", "words"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "boat", "truck"], "but not at its place"),
        (["fish", "mouse"], "10 class names for `x`, but its dataset has 2 classes"),
    ],
)
def test_own_labels_that_contradict_are_refused(tmp_path, kind, labels, message):
    with pytest.raises(DataError, match=message):
        make_task("x", {"data": written(tmp_path, kind, labels), "prompts": "cifar10"})


@pytest.mark.parametrize("kind", ["folders", "words"])
def test_own_labels_of_other_words_are_taken_in_order(tmp_path, kind):
    labels = ["AnnualCrop", "Forest", "HerbVegetation", "HighWay", "Industrial"]
    labels += ["Pasture", "PermanentCrop", "Residential", "River", "SeaLake"]
    task = make_task("x", {"data": written(tmp_path, kind, labels), "prompts": "eurosat"})
    assert task.classnames == prompt_set("eurosat").classnames


def written(root: Path, kind: str, labels: list[str]) -> str:
    """One image a label: in class folders, or in a table with a column of words."""
    for label in labels:
        folder = root / "images" / label
        folder.mkdir(parents=True)
        PILImage.new("RGB", (4, 4)).save(folder / f"{label}.png")
    rows = [f"images/{label}/{label}.png,{label}" for label in labels]
    (root / "table.csv").write_text("\n".join(["path,label", *rows]))
    return str(root / "images" if kind == "folders" else root / "table.csv")


def test_unlabelled_images_can_be_adapted_on_with_prompts_and_are_not_scored():
    spec = {"data": unlabelled(), "prompts": "mnist"}
    task = make_task("digits", spec, purpose=Purpose.ADAPTATION)
    assert (task.label_column, task.classnames) == (None, MNIST)
    with pytest.raises(DataError, match="`digits` has no label column"):
        make_task("digits", spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"prompts": "mnits"}, r"task `digits`: `prompts`='mnits' is not a prompt set; did you mean `mnist`"),
        ({"prompts": ["mnist"]}, r"`prompts`=\['mnist'\] of `digits` is not the name of a prompt set"),
        ({"prompts": "pcam"}, r"`digits` has labels up to 9, but there are 2 class names"),
        ({"prompt": "mnist"}, r"`prompt` is not an option of task `digits`; did you mean `prompts`"),
    ],
)
def test_prompts_that_cannot_be_are_refused(spec, message):
    with pytest.raises(DataError, match=message):
        make_task("digits", {"data": images([0, 9], Value("int64"))} | spec)


def test_held_out_images_are_a_fixed_random_tenth_of_train():
    data = DatasetDict({split: images(list(range(50)), Value("int64")) for split in ("train", "test")})
    found = make_task("x", {"data": data, "classnames": [str(i) for i in range(50)]}, split="held_out")
    labels = [found.item(i)[1] for i in range(len(found))]
    assert len(set(labels)) == 5
    assert labels != sorted(labels)
    again = make_task("x", {"data": data, "split": "held_out", "classnames": [str(i) for i in range(50)]})
    assert [again.item(i)[1] for i in range(5)] == labels


def test_held_out_split_of_the_data_themselves_comes_first():
    data = DatasetDict({"train": images([0] * 20, Value("int64")), "held_out": images([1], Value("int64"))})
    task = make_task("x", {"data": data, "split": "held_out", "prompts": "mnist"})
    assert [task.item(i)[1] for i in range(len(task))] == [1]


def test_nothing_can_be_held_out_without_training_images():
    with pytest.raises(DataError, match=r"has the splits test, but `split`='held_out' is not one of them"):
        make_task("x", {"data": DatasetDict({"test": images([0], Value("int64"))}), "split": "held_out"})
    few = DatasetDict({"train": images([0] * 9, Value("int64"))})
    with pytest.raises(DataError, match="is empty"):
        make_task("x", {"data": few, "split": "held_out", "prompts": "mnist"})
