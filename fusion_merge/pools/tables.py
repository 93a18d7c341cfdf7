"""Tables of images in text files: CSV and TSV, and whether the files that they name are there."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from fusion_merge.errors import DataError, reason
from fusion_merge.pools.decoding import absolute

DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_tables(files: Sequence[Path]) -> Dataset:
    """Read CSV or TSV files with a line of column names; a column of nothing but whole numbers becomes integers.

    Values are kept as they are written: no text stands for a missing value but the empty one.

    Args:
        files: the files; all must have the same columns.

    Raises:
        DataError: if one is no such table; the message names file and line.
    """
    columns: dict[str, list[str | None]] = {}
    for file in files:
        table = _read(file)
        if columns and list(table) != list(columns):
            raise DataError(f"`{file}` has the columns {', '.join(table)}, but `{files[0]}` has {', '.join(columns)}")
        for name, values in table.items():
            columns.setdefault(name, []).extend(values)
    return Dataset.from_dict({name: _whole_numbers(values) for name, values in columns.items()})


def check_files(name: str, paths: Sequence[Any], folder: Path | None) -> None:
    """Refuse a table with a path that does not exist.

    Args:
        name: what the task is called.
        paths: the paths, one a row.
        folder: what relative ones are relative to.

    Raises:
        DataError: if one is missing; the message names the row, counted from 0 as images are, and the path.
    """
    for row, path in enumerate(paths):
        if not path:
            raise DataError(f"the dataset of `{name}` has no path in row {row}")
        place = absolute(path, folder)
        if isinstance(place, str):
            raise DataError(f"row {row} of the dataset of `{name}` has `{path}`; download it and give a path")
        if not place.is_file():
            raise DataError(
                f"row {row} of the dataset of `{name}` has `{path}`, but there is no file `{place}`; paths are "
                "absolute, or relative to the folder of the table"
            )


def _read(file: Path) -> dict[str, list[str | None]]:
    rows = _rows(file)
    try:
        header = [name.strip() for _, names in zip(range(1), rows, strict=False) for name in names]
        if not header or not all(header) or len(set(header)) < len(header):
            raise DataError(f"`{file}` has no line of distinct column names at its top, such as `path,label`")
        columns: dict[str, list[str | None]] = {name: [] for name in header}
        for line, values in enumerate(rows, 2):
            if len(values) != len(header):
                raise DataError(
                    f"record {line} of `{file}` has {len(values)} values, but there are {len(header)} columns "
                    f"({', '.join(header)}); put a value with a separator in it into quotes"
                )
            for name, value in zip(header, values, strict=True):
                columns[name].append(value.strip() or None)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"`{file}` cannot be read as a table in UTF-8: {reason(error)}") from error
    return columns


def _rows(file: Path) -> Iterator[list[str]]:
    """Give the records that are not empty."""
    with file.open(encoding="utf-8-sig", newline="") as text:
        yield from (row for row in csv.reader(text, delimiter=DELIMITERS[file.suffix.lower()], strict=True) if row)


def _whole_numbers(values: list[str | None]) -> list[Any]:
    numbers = []
    for value in values:
        try:
            number = None if value is None else int(value)
        except ValueError:
            return values
        if number is not None and (str(number) != value or abs(number) >= 2**63):  # `007` is a text
            return values
        numbers.append(number)
    return numbers
