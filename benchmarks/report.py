"""Rows of figures, their ratios and targets; tables and JSON; the machine."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.timing import Comparison

OURS_TO_FLOOR, REFERENCE_TO_OURS = "ours / floor", "reference / ours"

_COLUMNS = ("floor", "ours", "reference")
_PACKAGES = ("torch", "transformers", "hydra-core", "fusion-bench")


@dataclass(frozen=True)
class Target:
    """What a figure or ratio of a row should be.

    Attributes:
        of: the name of the figure or ratio.
        limit: how much it should be at most.
        at_least: whether it should be that much at least, instead.
    """

    of: str
    limit: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        """Tell whether a value is good enough.

        Args:
            value: of the figure or ratio.
        """
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{self.of} {'≥' if self.at_least else '≤'} {shown(self.limit)}"


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        group: what is measured together.
        what: what is measured.
        unit: of the figures.
        figures: `ours`, and `floor` and `reference` where there are such.
        ratios: by name, such as `ours / floor`.
        target: if there is one.
        note: what the reader should know; paragraphs that rows share are shown once.
    """

    group: str
    what: str
    unit: str
    figures: Mapping[str, float]
    ratios: Mapping[str, float]
    target: Target | None = None
    note: str = ""

    @property
    def reached(self) -> float | None:
        """The value that the target is about."""
        return None if self.target is None else {**self.figures, **self.ratios}[self.target.of]

    @property
    def met(self) -> bool | None:
        """Whether the target is met, if there is one."""
        return None if self.target is None or self.reached is None else self.target.met(self.reached)

    def plain(self) -> dict[str, Any]:
        """Return the row as plain JSON values."""
        table: dict[str, Any] = {"group": self.group, "what": self.what, "unit": self.unit}
        table |= {"figures": dict(self.figures), "ratios": dict(self.ratios)}
        return table | {"target": str(self.target) if self.target else None, "met": self.met, "note": self.note}

    def cells(self) -> list[str]:
        """Return the row as a table shows it."""
        figures = [shown(self.figures[name]) if name in self.figures else "" for name in _COLUMNS]
        ratios = [
            shown(self.ratios[name]) if name in self.ratios else "" for name in (OURS_TO_FLOOR, REFERENCE_TO_OURS)
        ]
        verdict = "" if self.reached is None else f"{'yes' if self.met else 'no'} ({shown(self.reached)})"
        return [self.what, self.unit, *figures, *ratios, str(self.target or ""), verdict]


def timed_row(
    group: str, what: str, comparison: Comparison, *, ours: str = "ours", target: Target | None = None, note: str = ""
) -> Row:
    """Make a row of what was timed.

    Args:
        group: what is measured together.
        what: what is measured.
        comparison: the times; contestants other than the floor, ours and the reference become ratios.
        ours: which contestant is ours.
        target: if there is one; it is left out where what it compares with was not timed.
        note: what the reader should know.
    """
    names = {"floor": "floor", "ours": ours, "reference": "reference"}
    figures = {column: comparison.milliseconds(name) for column, name in names.items() if name in comparison}
    ratios = {f"ours / {rival}": comparison.ratio(ours, rival) for rival in ("floor", "WEMoE") if rival in comparison}
    if "reference" in comparison:
        ratios[REFERENCE_TO_OURS] = comparison.ratio("reference", ours)
    known = target if target is not None and target.of in {**figures, **ratios} else None
    return Row(group, what, "ms", figures, ratios, known, note)


def sized_row(
    group: str,
    what: str,
    unit: str,
    sizes: Mapping[str, float | None],
    *,
    target: Target | None = None,
    note: str = "",
) -> Row:
    """Make a row of what has a size.

    Args:
        group: what is measured together.
        what: what is measured.
        unit: MB or GB, of powers of ten.
        sizes: bytes, by the name of the figure; None where it is not known.
        target: if there is one; it is left out where what it compares with is not known.
        note: what the reader should know.
    """
    scale = {"MB": 1e6, "GB": 1e9}[unit]
    figures = {name: size / scale for name, size in sizes.items() if size is not None}
    ratios = {}
    if "floor" in figures:
        ratios[OURS_TO_FLOOR] = figures["ours"] / figures["floor"]
    if "reference" in figures:
        ratios[REFERENCE_TO_OURS] = figures["reference"] / figures["ours"]
    known = target if target is not None and target.of in {**figures, **ratios} else None
    return Row(group, what, unit, figures, ratios, known, note)


def shown(value: float) -> str:
    """Return a number in about three digits.

    Args:
        value: the number.
    """
    if abs(value) < 1:
        return f"{value:.2g}"
    return f"{value:,.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"


def tables(rows: Iterable[Row]) -> str:
    """Return the rows as Markdown, a table for each group, with its notes below.

    Args:
        rows: those of a group together.
    """
    headers = ["what", "unit", *_COLUMNS, OURS_TO_FLOOR, REFERENCE_TO_OURS, "target", "met"]
    parts = []
    for group, members in groupby(rows, key=lambda row: row.group):
        own = list(members)
        body = tabulate([row.cells() for row in own], headers=headers, tablefmt="github", disable_numparse=True)
        notes = dict.fromkeys(part for row in own for part in row.note.split("\n\n") if part)
        parts.append("\n\n".join([f"## {group}", body, *notes]))
    return "\n\n".join(parts)


def machine(threads: int) -> dict[str, str | int | float]:
    """Describe where this runs.

    Args:
        threads: of PyTorch.
    """
    about: dict[str, str | int | float] = {"processor": _processor(), "cores": os.cpu_count() or 1, "threads": threads}
    about["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    about |= {"system": platform.system(), "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            about[package] = version(package)
        except PackageNotFoundError:
            about[package] = "not installed"
    return about


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text(encoding="utf-8").splitlines() if table.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write(rows: list[Row], about: Mapping[str, Any], settings: Mapping[str, Any], stem: Path) -> str:
    """Write what was measured as Markdown and JSON; return the Markdown.

    Args:
        rows: what was measured.
        about: the machine.
        settings: of the run.
        stem: the files' path without suffix; their folder is there.
    """
    judged = [row for row in rows if row.met is not None]
    described = [", ".join(f"{key} {value}" for key, value in table.items()) for table in (about, settings)]
    text = "\n\n".join([*described, tables(rows), f"{sum(map(_met, judged))} of {len(judged)} targets met.\n"])
    content = {"machine": dict(about), "settings": dict(settings), "rows": [row.plain() for row in rows]}
    stem.with_suffix(".json").write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def _met(row: Row) -> bool:
    return bool(row.met)
