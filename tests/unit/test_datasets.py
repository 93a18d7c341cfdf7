"""Datasets from everywhere become tasks; what is wrong with them is said with names."""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from fusion_merge.errors import DataError
from fusion_merge.pools.datasets import DEFAULT_TEMPLATE, UNLABELLED, ImageTask, make_task
from fusion_merge.pools.reading import Purpose

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


@pytest.mark.parametrize("name", ["validation", "val", "valid", "dev"])
def test_validation_is_taken_where_there_is_no_test(name):
    assert len(make_task("cats", DatasetDict({"train": dataset([0, 1]), name: dataset()}))) == 4


def test_unclear_choice_of_splits_is_refused_with_those_that_are():
    with pytest.raises(DataError, match=r"train, extra.*`split`"):
        make_task("cats", DatasetDict({"train": dataset(), "extra": dataset()}))


@pytest.mark.parametrize("where", ["of the task", "of the pool"])
@pytest.mark.parametrize("split", ["validatoin", "train"])
def test_split_that_is_not_there_is_never_replaced(where, split):
    data = DatasetDict({"validation": dataset(), "test": dataset()})
    own, common = ({"split": split}, None) if where == "of the task" else ({}, split)
    with pytest.raises(DataError, match=f"`cats` has the splits validation, test, but `split`='{split}'"):
        make_task("cats", {"data": data, **own}, split=common)


def test_split_may_be_named_as_it_is_called_elsewhere():
    data = DatasetDict({"val": dataset([0, 1]), "test": dataset()})
    assert len(make_task("cats", {"data": data, "split": "validation"})) == 2


def test_task_s_own_split_comes_before_that_of_the_pool():
    assert len(make_task("cats", {"data": splits(), "split": "train"}, split="test")) == 2


@pytest.mark.parametrize("make", [lambda _: dataset(), lambda path: str(write_images(path))], ids=["object", "images"])
def test_split_of_data_without_splits_is_refused(make, tmp_path):
    with pytest.raises(DataError, match="`split`='test' of `cats`: its data have no splits"):
        make_task("cats", make(tmp_path), split="test")


def test_fine_tuning_takes_the_training_split():
    assert len(make_task("cats", splits(), purpose=Purpose.FINE_TUNING)) == 2
    assert len(make_task("dots", "zoo://tiny8/dots", purpose=Purpose.FINE_TUNING)) == 2400


@pytest.mark.parametrize("data", [dataset(), DatasetDict({"everything": dataset()})], ids=["no split", "nameless"])
def test_fine_tuning_takes_data_without_splits_whole(data):
    assert len(make_task("cats", data, purpose=Purpose.FINE_TUNING)) == 4


@pytest.mark.parametrize("names", [("validation", "test"), ("test",), ("val",)])
def test_fine_tuning_never_takes_another_split_by_itself(names):
    data = DatasetDict({name: dataset() for name in names})
    with pytest.raises(DataError, match=rf"`cats` has the splits {', '.join(names)}.*no `train`.*`split`"):
        make_task("cats", data, purpose=Purpose.FINE_TUNING)
    assert len(make_task("cats", {"data": data, "split": names[0]}, purpose=Purpose.FINE_TUNING)) == 4


# Splits of parquet files


@pytest.mark.parametrize(
    ("train", "other", "split"),
    [
        ("data/train-00000-of-00001", "data/test-00000-of-00001", "test"),
        ("default/train/0000", "default/test/0000", "test"),
        ("train_000", "test_000", "test"),
        ("train", "val-00000-of-00001", "validation"),
        ("train", "valid", "validation"),
        ("training/cats", "dev/cats", "validation"),
        ("cats.train", "cats.validation", "validation"),
        ("test_config/train/0000", "test_config/validation/0000", "validation"),
    ],
)
def test_splits_of_parquet_files_are_told_by_their_names(train, other, split, tmp_path):
    write_parquet(tmp_path / f"{train}.parquet", dataset([0, 1]))
    write_parquet(tmp_path / f"{other}.parquet", dataset([0, 1, 1]))
    sizes = {s: len(make_task("cats", {"data": str(tmp_path), "split": s})) for s in ("train", split)}
    assert sizes == {"train": 2, split: 3}
    assert len(make_task("cats", str(tmp_path))) == 3


def test_parquet_files_of_one_split_are_taken_together(tmp_path):
    for i in range(2):
        write_parquet(tmp_path / "test" / f"{i:04}.parquet", dataset([0, 1]))
    write_parquet(tmp_path / "train" / "0000.parquet", dataset())
    assert len(make_task("cats", str(tmp_path))) == 4


def test_parquet_files_without_splits_are_taken_together(tmp_path):
    for name in ("0000", "0001", "latest"):
        write_parquet(tmp_path / f"{name}.parquet", dataset([0, 1]))
    assert len(make_task("cats", str(tmp_path))) == 6


@pytest.mark.parametrize("other", ["extra", "train_test"])
def test_mix_of_parquet_files_with_and_without_splits_is_refused(other, tmp_path):
    write_parquet(tmp_path / "test.parquet", dataset())
    write_parquet(tmp_path / f"{other}.parquet", dataset())
    with pytest.raises(DataError, match=rf"`cats`.*{other}\.parquet` tells no split.*test\.parquet` belongs to `test`"):
        make_task("cats", str(tmp_path))


# Folders of images


def write_pictures(folder: Path, *names: str) -> str:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(i % 6).save(folder / name)
    return str(folder)


def classes_of(task: ImageTask) -> list[str]:
    return [task.classnames[task.item(i)[1]] for i in range(len(task))]


@pytest.mark.parametrize(
    "classes",
    [
        ["airport", "beach", "train_interior", "train_station"],
        ["test", "tube"],
        ["car", "train"],
        ["eval results", "dev-board", "valid"],
    ],
)
def test_class_folders_may_be_called_like_splits(classes, tmp_path):
    task = make_task("rooms", write_pictures(tmp_path, *(f"{name}/{i}.png" for name in classes for i in range(2))))
    assert task.classnames == tuple(sorted(classes))
    assert classes_of(task) == [name for name in sorted(classes) for _ in range(2)]


def test_image_files_may_be_called_like_splits(tmp_path):
    names = [f"{folder}/{file}.png" for folder in NAMES for file in ("test_0", "train-1", "2")]
    assert len(make_task("cats", write_pictures(tmp_path, *names))) == 6


def test_load_dataset_s_imagefolder_is_read_like_a_folder(tmp_path):
    write_pictures(tmp_path, "airport/0.png", "beach/0.png", "train_interior/0.png", "train_station/0.png")
    assert len(make_task("rooms", {"path": "imagefolder", "data_dir": str(tmp_path)}).classnames) == 4


def test_images_in_folders_of_splits_have_the_classes_of_all_splits(tmp_path):
    write_pictures(tmp_path, "train/tabby/0.png", "train/siamese/1.png", "val/tabby/0.png", "Test/tabby/0.JPG")
    for split, classes in {"train": ["siamese", "tabby"], "val": ["tabby"], "test": ["tabby"]}.items():
        task = make_task("cats", {"data": str(tmp_path), "split": split})
        assert (task.classnames, classes_of(task)) == (("siamese", "tabby"), classes)


def test_two_folders_for_one_split_are_refused(tmp_path):
    with pytest.raises(DataError, match="two folders for the split `validation`: `dev` and `val`"):
        make_task("cats", write_pictures(tmp_path, "dev/a/0.png", "val/a/0.png"))


def test_split_beside_something_else_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"train` looks like a split with class folders"):
        make_task("cats", write_pictures(tmp_path, "train/tabby/0.png", "extra/tabby/0.png"))


def test_class_folders_may_have_folders(tmp_path):
    task = make_task("cats", write_pictures(tmp_path, "siamese/2020/0.png", "siamese/1.png", "tabby/2021/0.png"))
    assert classes_of(task) == ["siamese", "siamese", "tabby"]


def test_single_folder_around_the_class_folders_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"the one class `data`, with folders in it.*give `.*/data`"):
        make_task("cats", write_pictures(tmp_path, "data/siamese/0.png", "data/tabby/0.png"))


def test_image_beside_class_folders_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"`cats`.*loose\.png` lies beside the class folders"):
        make_task("cats", write_pictures(tmp_path, "siamese/0.png", "tabby/0.png", "loose.png"))


def test_hidden_files_and_other_files_are_no_images(tmp_path):
    write_pictures(tmp_path, "siamese/0.png", "tabby/0.png", ".cache/x/0.png", "__MACOSX/tabby/0.png", "tabby/._0.png")
    (tmp_path / "tabby" / "notes.txt").write_text("meow")
    assert classes_of(make_task("cats", str(tmp_path))) == ["siamese", "tabby"]


def test_linked_class_folders_are_followed(tmp_path):
    write_pictures(tmp_path / "elsewhere", "0.png", "1.png")
    write_pictures(tmp_path / "cats", "tabby/0.png")
    (tmp_path / "cats" / "siamese").symlink_to(tmp_path / "elsewhere")
    assert len(make_task("cats", str(tmp_path / "cats"))) == 3


@pytest.fixture
def datasets_leaves_files_open() -> Iterator[None]:
    """Close here what `datasets` leaves open when it reads a table of images; warnings are errors elsewhere."""
    yield
    with warnings.catch_warnings(action="ignore", category=ResourceWarning):
        gc.collect()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("datasets_leaves_files_open")
def test_folder_described_by_a_table_is_read_as_datasets_does(tmp_path):
    write_pictures(tmp_path, "0.png", "test_1.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.png,1\ntest_1.png,0\n")
    task = make_task("cats", {"data": str(tmp_path), "classnames": NAMES})
    assert sorted((shade(image), label) for image, label in map(task.item, range(2))) == [(0, 1), (1, 0)]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.usefixtures("datasets_leaves_files_open")
def test_table_that_leaves_images_out_is_refused(tmp_path):
    write_pictures(tmp_path, "0.png", "1.png", "2.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\n0.png,1\n1.png,0\n")
    with pytest.raises(DataError, match="`cats`"):
        make_task("cats", {"data": str(tmp_path), "classnames": NAMES})


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


def unlabelled_folder(path: Path) -> str:
    return write_pictures(path, *(f"{i}.png" for i in range(4)))


UNLABELLED_SOURCES = {
    "flat folder": unlabelled_folder,
    "flat folders of splits": lambda path: write_pictures(path, "train/0.png", *(f"test/{i}.png" for i in range(4))),
    "no label column": lambda _: dataset().remove_columns("label"),
    "labels of -1": lambda _: dataset([-1] * 4),
    "labels of null": lambda _: dataset([0, 1, None, None]),
    "rows without labels": lambda _: [{"image": picture(i)} for i in range(4)],
}


@pytest.mark.parametrize("kind", UNLABELLED_SOURCES)
def test_unlabelled_images_can_be_adapted_on_and_not_scored(kind, tmp_path):
    spec = {"data": UNLABELLED_SOURCES[kind](tmp_path), "classnames": NAMES}
    task = make_task("cats", spec, purpose=Purpose.ADAPTATION)
    assert (task.label_column, task.classnames) == (None, tuple(NAMES))
    assert [task.item(i)[1] for i in range(4)] == [UNLABELLED] * 4
    for purpose in (Purpose.SCORING, Purpose.FINE_TUNING):
        with pytest.raises(DataError, match=r"`cats` has (no label column|images without a label)"):
            make_task("cats", spec, purpose=purpose)


def test_unlabelled_images_need_classnames_even_for_adaptation(tmp_path):
    with pytest.raises(DataError, match=r"`cats` has no label column.*adapted on, if `classnames` are given"):
        make_task("cats", unlabelled_folder(tmp_path), purpose=Purpose.ADAPTATION)


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
    data = dataset(feature=Value("int64"))
    with pytest.raises(DataError, match=r"`cats` has labels up to 1, but there are 1 class names.*`classnames`"):
        make_task("cats", {"data": data, "classnames": ["cat"]})


@pytest.mark.parametrize("names", [["cat"], ["alpha", "beta", "gamma"]])
def test_another_number_of_class_names_than_classes_is_refused(names):
    message = rf"there are {len(names)} class names for `cats`, but its dataset has 2 classes \(siamese, tabby\)"
    with pytest.raises(DataError, match=message):
        make_task("cats", {"data": dataset(), "classnames": names})


def test_class_folders_and_labels_that_are_numbers_are_in_their_order(tmp_path):
    numbers = [str(n) for n in range(12)]
    for number in numbers:
        (tmp_path / "images" / number).mkdir(parents=True)
        picture(0).save(tmp_path / "images" / number / "0.png")
    rows = [{"file": f"images/{n}/0.png", "label": n} for n in numbers]
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    names = [f"class {n}" for n in numbers]
    for data in (tmp_path / "images", tmp_path / "table.jsonl"):
        task = make_task("x", {"data": str(data), "classnames": names})
        at = {task.file_name(i).split("/")[-2]: task.classnames[task.item(i)[1]] for i in range(12)}
        assert at == dict(zip(numbers, names, strict=True))


def test_a_table_beside_class_folders_is_not_passed_over(tmp_path):
    (tmp_path / "images").mkdir()
    picture(0).save(tmp_path / "images" / "0.png")
    (tmp_path / "labels.csv").write_text("path,label\nimages/0.png,1\n")
    with pytest.raises(DataError, match=r"has images and a table, `labels.csv`; give `.*labels.csv` if it has their"):
        make_task("x", str(tmp_path))
    assert make_task("x", {"data": str(tmp_path / "labels.csv"), "classnames": ["a", "b"]}).item(0)[1] == 1


def test_labels_that_are_not_whole_numbers_are_refused():
    with pytest.raises(DataError, match=r"column `label` of `cats`.*not integer labels"):
        make_task("cats", {"data": dataset([0.5, 1.0], feature=Value("float32")), "classnames": NAMES})


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


# `dataset()` has the labels siamese (0) and tabby (1), as folders of these names have


@pytest.mark.parametrize("make", [lambda _: dataset(), write_images], ids=["dataset", "image folder"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["tabby", "siamese"], ["siamese", "tabby"]),
        (["siamese", "tabby"], ["siamese", "tabby"]),
        (["Tabby", "SIAMESE"], ["SIAMESE", "Tabby"]),
        (["a royal cat", "a striped cat"], ["a royal cat", "a striped cat"]),
        (["siamese", "a striped cat"], ["siamese", "a striped cat"]),
        ({"tabby": "a striped cat", "siamese": "a royal cat"}, ["a royal cat", "a striped cat"]),
    ],
    ids=["reversed", "in order", "capitals", "others", "one other", "mapping"],
)
def test_class_names_stand_for_the_right_labels(make, given, expected, tmp_path):
    task = make_task("cats", {"data": make(tmp_path), "classnames": given})
    labels = {shade(image): label for image, label in map(task.item, range(4))}
    assert labels == dict(enumerate(LABELS))  # the images' own: 0 for siamese, 1 for tabby
    assert list(task.classnames) == expected


def test_underscores_of_label_names_may_be_spaces():
    data = dataset(feature=ClassLabel(names=["long_haired", "short_haired"]))
    task = make_task("cats", {"data": data, "classnames": ["short haired", "long haired"]})
    assert task.classnames == ("long haired", "short haired")


@pytest.mark.parametrize("given", [["tabby", "lion"], ["lion", "siamese"], ["lion", "siamese", "tabby"]])
def test_label_name_in_the_place_of_another_is_refused(given):
    with pytest.raises(
        DataError, match=r"has \d names, of which '\w+' is one of the 2 .*not at its place.*Give all of siamese, tabby"
    ):
        make_task("cats", {"data": dataset(), "classnames": given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tabby": "a", "siamse": "b"}, "`siamse`, not a label of the dataset; did you mean `siamese`"),
        ({"tabby": "a"}, "nothing for the dataset's label `siamese`; add"),
        ({"tabby": "a", "siamese": None}, "None for `siamese`, not a text"),
    ],
)
def test_mapping_of_class_names_must_have_each_label_once(given, message):
    with pytest.raises(DataError, match=f"`classnames` of `cats` has {message}"):
        make_task("cats", {"data": dataset(), "classnames": given})


def test_mapping_of_class_names_needs_a_dataset_that_names_its_labels():
    with pytest.raises(DataError, match=r"`classnames` of `cats` is a mapping.*give a list"):
        make_task("cats", {"data": [(picture(0), 0)], "classnames": {"tabby": "a"}})


def test_numbers_may_be_keys_of_class_names():
    data = dataset(feature=ClassLabel(names=["0", "1"]))
    assert make_task("cats", {"data": data, "classnames": {1: "one", 0: "zero"}}).classnames == ("zero", "one")


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


def test_what_is_not_in_a_folder_that_is_here_is_said_to_be_missing_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images" / "elephants").mkdir(parents=True)
    with pytest.raises(DataError, match="`images/nix`, which is not in the folder `images` that is here"):
        make_task("cats", "images/nix")


def test_what_is_there_and_cannot_be_read_is_not_said_to_be_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "cats.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"from `images/cats\.parquet`: "):
        make_task("cats", "images/cats.parquet")


def test_file_of_an_unknown_kind_is_refused(tmp_path):
    (tmp_path / "cats.txt").write_text("meow")
    with pytest.raises(DataError, match=r"cats\.txt.*known are \.parquet"):
        make_task("cats", str(tmp_path / "cats.txt"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("zoo://tiny9/dots", "no pool `tiny9`.*did you mean `tiny8`"),
        ("zoo://tiny8/dotts", "'dotts'.*dots"),
        ("zoo://tiny8", "tiny8"),
    ],
)
def test_unknown_embedded_task_is_refused(source, message):
    with pytest.raises(DataError, match=message) as caught:
        make_task("cats", source)
    assert "`cats`" in str(caught.value)


def test_what_is_no_dataset_is_refused():
    with pytest.raises(DataError, match="`cats`"):
        make_task("cats", 3)
