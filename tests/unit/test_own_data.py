"""Own data without Python: tables of paths, images in any column, labels in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from runs import own_pool, run_cli

from fusion_merge.errors import DataError
from fusion_merge.pools.datasets import ImageTask, make_task
from fusion_merge.pools.reading import Purpose

WORDS = ["tabby", "siamese", "tabby", "persian"]
NAMES = ("persian", "siamese", "tabby")
NUMBERS = [2, 1, 2, 0]


def picture(i: int) -> PILImage.Image:
    return PILImage.fromarray(np.full((6, 5, 3), 40 * i, np.uint8))


def shades(task: ImageTask) -> list[int]:
    return [int(np.asarray(task.item(i)[0])[0, 0, 0]) // 40 for i in range(len(task))]


def labels(task: ImageTask) -> list[int]:
    return [task.item(i)[1] for i in range(len(task))]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "pictures").mkdir()
    for i in range(4):
        picture(i).save(tmp_path / "pictures" / f"{i}.png")
    return tmp_path


def write(
    folder: Path, kind: str, column: str, labels: list[Any], *, label: str = "label", absolute: bool = False
) -> str:
    base = folder if absolute else Path()
    rows = [{column: str(base / "pictures" / f"{i}.png"), label: value} for i, value in enumerate(labels)]
    file = folder / f"cats.{kind}"
    if kind == "json":
        file.write_text(json.dumps(rows))
    elif kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        separator = {"csv": ",", "tsv": "\t"}[kind]
        file.write_text(
            separator.join((column, label))
            + "\n"
            + "".join(separator.join(map(str, row.values())) + "\n" for row in rows)
        )
    return str(file)


# Tables of paths


@pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_table_of_paths_and_words_is_a_task(folder, kind, absolute):
    task = make_task("cats", write(folder, kind, "path", WORDS, absolute=absolute))
    assert task.classnames == NAMES
    assert (shades(task), labels(task)) == ([0, 1, 2, 3], NUMBERS)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_labels_may_be_numbers_with_class_names(folder, kind):
    task = make_task("cats", {"data": write(folder, kind, "path", NUMBERS), "classnames": list(NAMES)})
    assert (task.classnames, labels(task)) == (NAMES, NUMBERS)


@pytest.mark.parametrize("column", ["image", "path", "file", "file_name", "filename", "filepath", "image_path"])
def test_usual_columns_of_paths_are_found(folder, column):
    assert shades(make_task("cats", write(folder, "csv", column, WORDS))) == [0, 1, 2, 3]


def test_other_columns_may_be_named(folder):
    spec = {
        "data": write(folder, "csv", "where", WORDS, label="breed"),
        "image_column": "where",
        "label_column": "breed",
    }
    assert labels(make_task("cats", spec)) == NUMBERS


def test_files_named_after_splits_are_those_splits(folder):
    source = Path(write(folder, "csv", "path", WORDS))
    for name in ("train", "test"):
        (folder / f"{name}.csv").write_text(source.read_text())
    assert len(make_task("cats", {"data": str(folder / "test.csv"), "split": "test"})) == 4
    with pytest.raises(DataError, match="has the splits test, but `split`='train'"):
        make_task("cats", {"data": str(folder / "test.csv"), "split": "train"})


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["007", "1", "2", "1"], ["1", "2", "007"]),
        (["NA", "nan", "null", "None"], ["NA", "None", "nan", "null"]),
        (["a, b", "c", 'd"e', "é"], ["a, b", "c", 'd"e', "é"]),
        (["true", "false", "true", "x y"], ["false", "true", "x y"]),
        (["1.0", "2.0", "1.0", "2.0"], ["1.0", "2.0"]),
    ],
)
def test_words_of_a_table_are_kept_as_they_are(folder, rows, expected):
    lines = ['"' + row.replace('"', '""') + '"' for row in rows]
    (folder / "cats.csv").write_text(
        "\ufeffpath,label\n\n" + "".join(f"pictures/{i}.png,{r}\n" for i, r in enumerate(lines))
    )
    task = make_task("cats", str(folder / "cats.csv"))
    assert task.classnames == tuple(expected)
    assert labels(task) == [expected.index(row) for row in rows]


def test_table_without_labels_can_be_adapted_on(folder):
    (folder / "cats.csv").write_text("path\npictures/0.png\npictures/1.png\n")
    spec = {"data": str(folder / "cats.csv"), "classnames": list(NAMES)}
    task = make_task("cats", spec, purpose=Purpose.ADAPTATION)
    assert (task.label_column, shades(task)) == (None, [0, 1])


@pytest.mark.parametrize("label", ["", "  "])
def test_empty_label_is_a_missing_one(folder, label):
    (folder / "cats.csv").write_text(f"path,label\npictures/0.png,tabby\npictures/1.png,{label}\n")
    with pytest.raises(DataError, match=r"images without a label"):
        make_task("cats", str(folder / "cats.csv"))
    spec = {"data": str(folder / "cats.csv"), "classnames": ["tabby", "persian"]}
    assert labels(make_task("cats", spec, purpose=Purpose.ADAPTATION)) == [-1, -1]


def test_missing_file_is_named_by_row_and_path(folder):
    table = write(folder, "csv", "path", WORDS)
    (folder / "pictures" / "2.png").unlink()
    with pytest.raises(
        DataError, match=r"row 2 of the dataset of `cats` has `pictures/2\.png`, but there is no file"
    ) as caught:
        make_task("cats", table)
    assert f"`{folder}/pictures/2.png`" in str(caught.value)


@pytest.mark.parametrize("path", ["", "https://example.org/cat.jpg", "pictures"])
def test_what_is_no_file_is_refused_by_row(folder, path):
    (folder / "cats.csv").write_text(f"path,label\npictures/0.png,a\n{path},b\n")
    with pytest.raises(DataError, match="row 1"):
        make_task("cats", str(folder / "cats.csv"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path,label\npictures/0.png,a,b\n", "record 2 of `.*cats.csv` has 3 values, but there are 2 columns"),
        (b"path,label\npictures/0.png\n", "record 2 of .* has 1 values"),
        (b"", "no line of distinct column names"),
        (b"path,path\npictures/0.png,a\n", "no line of distinct column names"),
        (b"path,\npictures/0.png,a\n", "no line of distinct column names"),
        (b"path,label\n", "is empty"),
        (b"path,label\n\xff\xfe,a\n", "cannot be read as a table in UTF-8"),
        (b'path,label\n"pictures/0.png,a\n', "cannot be read as a table"),
        (b"pictures/0.png,a\npictures/1.png,b\n", "no image column among pictures/0.png, a"),
        (b"width,label\n5,a\n", "no image column among width, label"),
    ],
)
def test_broken_table_is_refused(folder, content, message):
    (folder / "cats.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        make_task("cats", str(folder / "cats.csv"))


def test_a_run_takes_a_table_from_the_command_line(pool_dir, tmp_path):
    files = sorted((pool_dir / "images" / "cats").rglob("*.png"))
    (tmp_path / "cats.csv").write_text("path,label\n" + "".join(f"{file},{file.parent.name}\n" for file in files))
    arguments = [a for a in own_pool(pool_dir) if "tasks.cats" not in a]
    options = [f"+taskpool.tasks.cats={{data: {tmp_path / 'cats.csv'}, label_column: label}}", "method=simple_average"]
    done = run_cli(*arguments, *options, "baselines=[]", "output_dir=out", cwd=tmp_path / "run")
    assert done.code == 0, done.err
    folder = run_cli(*own_pool(pool_dir), *options[1:], "baselines=[]", "output_dir=out", cwd=tmp_path / "folder")
    reports = [json.loads((tmp_path / where / "out" / "report.json").read_text()) for where in ("run", "folder")]
    assert folder.code == 0
    assert reports[0]["cats"] == reports[1]["cats"]


# Images in any column


def plain(i: int) -> bytes:
    import io

    buffer = io.BytesIO()
    picture(i).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("large", [False, True])
def test_bytes_are_images(tmp_path, large):
    kind = pa.large_binary() if large else pa.binary()
    words = pa.array(WORDS, pa.large_string() if large else pa.string())
    pq.write_table(
        pa.table({"content": pa.array([plain(i) for i in range(4)], kind), "label": words}), tmp_path / "a.parquet"
    )
    task = make_task("cats", str(tmp_path / "a.parquet"))
    assert (shades(task), labels(task), task.classnames) == ([0, 1, 2, 3], NUMBERS, NAMES)


def test_tables_of_other_libraries_hold_images_too(tmp_path):
    """Bytes and path of each image, without what `datasets` says about its columns."""
    rows = [{"photo": {"bytes": plain(i), "path": f"{i}.png"}, "label": word} for i, word in enumerate(WORDS)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    task = make_task("cats", str(tmp_path / "a.parquet"))
    assert shades(task) == [0, 1, 2, 3]
    assert task.file_name(2) == "2.png"


def test_rows_in_memory_may_hold_paths(folder):
    rows = [(folder / "pictures" / f"{i}.png", i) for i in range(3)]
    task = make_task("cats", {"data": rows, "classnames": list(NAMES)})
    assert (shades(task), labels(task)) == ([0, 1, 2], [0, 1, 2])


def test_column_that_holds_no_images_is_refused(folder):
    data = Dataset.from_dict({"width": [1, 2], "label": [0, 1]})
    with pytest.raises(DataError, match="column `width` of `cats` holds int64 values, not images or paths"):
        make_task("cats", {"data": data, "image_column": "width", "classnames": ["a", "b"]})


def test_other_images_of_a_row_are_not_decoded():
    features = Features({"image": Image(), "mask": Image(), "label": Value("string")})
    rows = {"image": [picture(1)], "mask": [{"bytes": b"broken", "path": None}], "label": ["a"]}
    assert shades(make_task("cats", Dataset.from_dict(rows, features=features))) == [1]


def test_transform_of_a_dataset_stays():
    rows = {"image": [picture(1)], "label": ["a"]}
    data = Dataset.from_dict(rows, features=Features({"image": Image(), "label": Value("string")}))
    turned = data.with_transform(
        lambda batch: {**batch, "image": [image.point(lambda v: v + 40) for image in batch["image"]]}
    )
    assert shades(make_task("cats", turned)) == [2]


# Labels in words


def words(values: list[str | None]) -> Dataset:
    features = Features({"image": Image(), "label": Value("string")})
    return Dataset.from_dict({"image": [picture(i) for i in range(len(values))], "label": values}, features=features)


def test_classes_are_those_of_all_splits():
    data = DatasetDict({"train": words(["a", "c", "d"]), "test": words(["d", "b"])})
    for split, expected in (("train", [0, 2, 3]), ("test", [3, 1])):
        task = make_task("cats", {"data": data, "split": split})
        assert (task.classnames, labels(task)) == (("a", "b", "c", "d"), expected)


@pytest.mark.parametrize(
    ("given", "expected", "numbers"),
    [
        (["tabby", "siamese", "persian"], ["tabby", "siamese", "persian"], [0, 1, 0, 2]),
        (["lion", "tabby", "siamese", "persian"], ["lion", "tabby", "siamese", "persian"], [1, 2, 1, 3]),
        (["a persian", "a siamese", "a tabby"], ["a persian", "a siamese", "a tabby"], NUMBERS),
        ({"tabby": "T", "siamese": "S", "persian": "P"}, ["P", "S", "T"], NUMBERS),
        ({"tabby": "T", "lion": "L", "siamese": "S", "persian": "P"}, ["L", "P", "S", "T"], [3, 2, 3, 1]),
    ],
    ids=["other order", "one without an image", "other names", "mapping", "mapping with one more"],
)
def test_class_names_stand_for_the_right_words(given, expected, numbers):
    task = make_task("cats", {"data": words(WORDS), "classnames": given})
    assert (list(task.classnames), labels(task)) == (expected, numbers)


@pytest.mark.parametrize("given", [["tabby", "siamese"], {"tabby": "T"}, ["x", "y"]])
def test_words_without_a_class_name_are_refused(given):
    with pytest.raises(DataError, match="`cats`"):
        make_task("cats", {"data": words(WORDS), "classnames": given})


def test_numbers_of_one_s_own_may_be_keys_of_class_names(folder):
    table = write(folder, "csv", "path", [30, 10, 30, 20])
    task = make_task("cats", {"data": table, "classnames": {10: "ten", "20": "twenty", 30: "thirty"}})
    assert (task.classnames, labels(task)) == (("ten", "twenty", "thirty"), [2, 0, 2, 1])
    with pytest.raises(DataError, match="has the label 30, which `classnames` does not have"):
        make_task("cats", {"data": table, "classnames": {10: "ten", 20: "twenty"}})


def test_words_in_rows_of_one_s_own_are_refused_clearly():
    task = make_task("cats", {"data": [(picture(0), "tabby")], "classnames": ["tabby"]})
    with pytest.raises(DataError, match=r"`cats`: image 0 has label 'tabby', not a whole number"):
        task.item(0)
