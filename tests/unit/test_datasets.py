"""Datasets from everywhere become tasks; what is wrong with them is said with names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from fusion_merge.errors import DataError
from fusion_merge.pools.datasets import DEFAULT_TEMPLATE, make_task

NAMES = ["siamese", "tabby"]
LABELS = [0, 1, 1, 0]


def picture(i: int) -> PILImage.Image:
    return PILImage.fromarray(np.full((6, 5, 3), 40 * i, np.uint8))


def dataset(
    labels: list[Any] | None = None, *, label: str = "label", image: str = "image", feature: Any = None
) -> Dataset:
    """A dataset of pictures, each a shade of grey that tells its index."""
    labels = LABELS if labels is None else labels
    features = Features({image: Image(), label: feature or ClassLabel(names=NAMES)})
    return Dataset.from_dict({image: [picture(i) for i in range(len(labels))], label: labels}, features=features)


def splits() -> DatasetDict:
    return DatasetDict({"train": dataset([0, 1]), "test": dataset([0, 1, 1, 0])})


def shade(image: Any) -> int:
    return int(np.asarray(image)[0, 0, 0]) // 40


def write_images(folder: Path) -> Path:
    for i, label in enumerate(LABELS):
        (folder / NAMES[label]).mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / NAMES[label] / f"{i}.png")
    return folder


def write_parquet(file: Path, data: Dataset) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    data.to_parquet(file)
    return file


def write_split_folder(folder: Path) -> Path:
    """A folder as the hub lays it out: files named by their split."""
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", dataset([0, 1]))
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", dataset())
    return folder


def save(folder: Path, data: Dataset | DatasetDict) -> Path:
    data.save_to_disk(folder)
    return folder


def make_dataset_for_target(labels: list[int]) -> Dataset:
    return dataset(labels)


SOURCES = {
    "image folder": write_images,
    "parquet file": lambda path: write_parquet(path / "cats.parquet", dataset()),
    "parquet folder": lambda path: write_parquet(path / "cats.parquet", dataset()).parent,
    "parquet folder with splits": write_split_folder,
    "saved dataset": lambda path: save(path / "saved", dataset()),
    "saved splits": lambda path: save(path / "saved", splits()),
    "dataset": lambda _: dataset(),
    "dataset of splits": lambda _: splits(),
    "target": lambda _: {"_target_": "test_datasets.make_dataset_for_target", "labels": LABELS},
    "load_dataset options": lambda path: {"path": "imagefolder", "data_dir": str(write_images(path))},
}


@pytest.fixture(params=list(SOURCES))
def source(request, tmp_path, monkeypatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    made = SOURCES[request.param](tmp_path)
    return str(made) if isinstance(made, Path) else made


# Where data come from


def test_every_kind_of_source_becomes_a_task(source):
    task = make_task("cats", source)
    assert len(task) == 4
    assert task.classnames == tuple(NAMES)
    pictures = {shade(image): label for image, label in (task.item(i) for i in range(4))}
    assert pictures == dict(enumerate(LABELS))


def test_the_same_source_may_stand_under_data_with_options(source):
    task = make_task("cats", {"data": source, "classnames": ["Siamese cat", "tabby cat"], "templates": ["a {}."]})
    assert len(task) == 4
    assert task.classnames == ("Siamese cat", "tabby cat")
    assert task.templates == ("a {}.",)


def test_rows_may_be_mappings():
    rows = [{"image": picture(i), "label": label} for i, label in enumerate(LABELS)]
    task = make_task("cats", {"data": rows, "classnames": NAMES})
    assert [(shade(image), label) for image, label in map(task.item, range(4))] == list(enumerate(LABELS))


def test_rows_may_be_pairs():
    rows = [(picture(i), label) for i, label in enumerate(LABELS)]
    task = make_task("cats", {"data": rows, "classnames": NAMES})
    assert [(shade(image), label) for image, label in map(task.item, range(4))] == list(enumerate(LABELS))


def test_template_defaults_to_a_photo():
    assert make_task("cats", dataset()).templates == (DEFAULT_TEMPLATE,) == ("a photo of a {}.",)


def test_embedded_task_brings_its_own_names_and_templates():
    task = make_task("dots", "zoo://tiny8/dots")
    assert task.classnames == ("one", "two", "three", "four", "five")
    assert task.templates == ("a picture of {} dots.", "{} dots.")


def test_own_templates_replace_those_of_an_embedded_task():
    assert make_task("dots", {"data": "zoo://tiny8/dots", "templates": ["{}!"]}).templates == ("{}!",)


# Splits


def test_test_split_is_taken_by_default():
    assert len(make_task("cats", splits())) == 4


def test_named_split_is_taken():
    assert len(make_task("cats", {"data": splits(), "split": "train"})) == 2


def test_named_split_of_a_folder_is_taken(tmp_path):
    assert len(make_task("cats", {"data": str(write_split_folder(tmp_path)), "split": "train"})) == 2


def test_named_split_of_an_embedded_task_is_taken():
    assert len(make_task("dots", {"data": "zoo://tiny8/dots", "split": "train"})) == 2400


def test_only_split_is_taken_whatever_its_name():
    assert len(make_task("cats", DatasetDict({"whatever": dataset()}))) == 4


@pytest.mark.parametrize("data", [splits(), DatasetDict({"train": dataset()})], ids=["two splits", "one split"])
def test_split_that_is_not_there_is_refused_with_those_that_are(data):
    with pytest.raises(DataError, match=r"`cats`.*train"):
        make_task("cats", {"data": data, "split": "validation"})


def test_unclear_choice_of_splits_is_refused_with_those_that_are():
    with pytest.raises(DataError, match=r"train, validation.*`split`"):
        make_task("cats", DatasetDict({"train": dataset(), "validation": dataset()}))


# Columns


@pytest.mark.parametrize("column", ["label", "labels", "fine_label", "cls"])
def test_usual_label_columns_are_found(column):
    assert make_task("cats", dataset(label=column)).item(1)[1] == 1


@pytest.mark.parametrize("column", ["image", "img", "jpg", "png", "webp"])
def test_usual_image_columns_are_found(column):
    assert shade(make_task("cats", dataset(image=column)).item(3)[0]) == 3


def test_unusual_columns_are_found_by_their_type():
    task = make_task("cats", dataset(image="picture", label="breed"))
    assert (task.image_column, task.label_column) == ("picture", "breed")


def test_columns_may_be_named():
    data = dataset(label="breed", feature=Value("int64")).add_column("label", [7, 7, 7, 7])
    task = make_task("cats", {"data": data, "label_column": "breed", "classnames": NAMES})
    assert [task.item(i)[1] for i in range(4)] == LABELS


def test_columns_that_cannot_be_guessed_may_be_named():
    data = dataset(label="breed", feature=Value("int64"))
    task = make_task("cats", {"data": data, "label_column": "breed", "classnames": NAMES})
    assert task.item(1)[1] == 1


@pytest.mark.parametrize(
    ("option", "wrong", "right"), [("image_column", "imge", "image"), ("label_column", "lable", "label")]
)
def test_wrong_column_is_refused_with_the_nearest(option, wrong, right):
    with pytest.raises(DataError, match=f"`{option}`='{wrong}'.*`cats`.*did you mean `{right}`"):
        make_task("cats", {"data": dataset(), option: wrong})


# Labels


def test_true_and_false_are_labels():
    task = make_task("cats", {"data": dataset([True, False], feature=Value("bool")), "classnames": NAMES})
    assert [task.item(i)[1] for i in range(2)] == [1, 0]


def test_dataset_without_labels_is_refused():
    with pytest.raises(DataError, match=r"`cats` has no label column.*`label_column`"):
        make_task("cats", dataset().remove_columns("label"))


def test_image_folder_without_class_folders_is_refused(tmp_path):
    picture(0).save(tmp_path / "0.png")
    picture(1).save(tmp_path / "1.png")
    with pytest.raises(DataError, match=r"`cats` has no label column"):
        make_task("cats", str(tmp_path))


def test_unlabelled_images_are_refused():
    with pytest.raises(DataError, match=r"`cats` has images without a label \(label -1\)"):
        make_task("cats", dataset([0, -1]))


def test_missing_labels_are_refused():
    with pytest.raises(DataError, match=r"`cats`"):
        make_task("cats", dataset([0, None]))


def test_more_labels_than_class_names_are_refused():
    with pytest.raises(DataError, match=r"`cats` has labels up to 1, but there are 1 class names.*`classnames`"):
        make_task("cats", {"data": dataset(), "classnames": ["cat"]})


@pytest.mark.parametrize(("labels", "kind"), [(["a", "b"], "string"), ([0.5, 1.0], "float32")])
def test_labels_that_are_not_whole_numbers_are_refused(labels, kind):
    with pytest.raises(DataError, match=r"column `label` of `cats`.*not integer labels"):
        make_task("cats", {"data": dataset(labels, feature=Value(kind)), "classnames": NAMES})


def test_wrong_label_in_a_list_is_refused_when_it_is_read():
    task = make_task("cats", {"data": [(picture(0), 0), (picture(1), 2)], "classnames": NAMES})
    with pytest.raises(DataError, match=r"`cats`: image 1 has label 2, but there are 2 classes"):
        task.item(1)


# Names and templates


@pytest.mark.parametrize(
    "data", [dataset(feature=Value("int64")), [(picture(0), 0)]], ids=["dataset without names", "list"]
)
def test_nameless_classes_are_refused(data):
    with pytest.raises(DataError, match=r"`cats` does not name its classes; give them with `classnames`"):
        make_task("cats", data)


def test_template_without_a_place_for_the_name_is_refused():
    with pytest.raises(DataError, match=r"template 'a photo' of `cats` has no `\{\}`"):
        make_task("cats", {"data": dataset(), "templates": ["a {}.", "a photo"]})


@pytest.mark.parametrize(("option", "value"), [("classnames", "tabby"), ("templates", "a photo of a {}.")])
def test_one_text_where_a_list_belongs_is_refused(option, value):
    with pytest.raises(DataError, match=f"`{option}`.*{value}"):
        make_task("cats", {"data": dataset(), option: value})


# What is wrong with a spec


@pytest.mark.parametrize(
    ("spec", "nearest"),
    [
        ({"data": dataset(), "classname": NAMES}, "`classname`.*`cats`.*did you mean `classnames`"),
        ({"data": dataset(), "template": ["{}"]}, "`template`.*`cats`.*did you mean `templates`"),
        ({"dta": "some/folder"}, "`dta`.*`cats`.*did you mean `data`"),
    ],
    ids=["classname", "template", "dta"],
)
def test_unknown_key_is_refused_with_the_nearest(spec, nearest):
    with pytest.raises(DataError, match=nearest):
        make_task("cats", spec)


@pytest.mark.parametrize(
    "make",
    [
        lambda _: dataset([]),
        lambda _: [],
        lambda path: str(write_parquet(path / "empty.parquet", dataset([]))),
        lambda path: str(save(path / "saved", dataset([]))),
    ],
    ids=["dataset", "list", "parquet", "saved dataset"],
)
def test_empty_dataset_is_refused(make, tmp_path):
    with pytest.raises(DataError, match="the dataset of `cats` is empty"):
        make_task("cats", {"data": make(tmp_path), "classnames": NAMES})


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=f"`cats`.*{tmp_path}"):
        make_task("cats", str(tmp_path))


@pytest.mark.parametrize("path", ["/no/such/folder", "./no_such_folder", "~/no_such_folder"])
def test_missing_path_is_refused(path):
    with pytest.raises(DataError, match=f"`{path}` does not exist") as caught:
        make_task("cats", path)
    assert "`cats`" in str(caught.value)


@pytest.mark.parametrize("path", ["no_such_folder", "no/such/folder", "no_such/data.parquet"])
def test_what_is_neither_a_path_nor_on_the_hub_is_refused(path):
    with pytest.raises(DataError, match=f"`cats` from `{path}`"):
        make_task("cats", path)


def test_file_of_an_unknown_kind_is_refused(tmp_path):
    (tmp_path / "cats.txt").write_text("meow")
    with pytest.raises(DataError, match=r"cats\.txt.*known are \.parquet"):
        make_task("cats", str(tmp_path / "cats.txt"))


@pytest.mark.parametrize(
    ("source", "message"),
    [("zoo://tiny9/dots", "no pool `tiny9`"), ("zoo://tiny8/dotts", "'dotts'.*dots"), ("zoo://tiny8", "tiny8")],
)
def test_unknown_embedded_task_is_refused(source, message):
    with pytest.raises(DataError, match=message) as caught:
        make_task("cats", source)
    assert "`cats`" in str(caught.value)


def test_what_is_no_dataset_is_refused():
    with pytest.raises(DataError, match="`cats`"):
        make_task("cats", 3)
