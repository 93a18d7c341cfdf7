"""Published rows, and how what was measured here compares with them. All figures are accuracies in percent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from fusion_merge.errors import ConfigError, nearest

ROUTINGS = ("batch", "sample")
AVERAGE = "average"

_KEYS = ("title", "source", "published", "tolerance", "evaluated_with", "baseline", "note")
_ROUNDING = 1e-6


@dataclass(frozen=True)
class PublishedRow:
    """One row of a published table.

    Attributes:
        name: the preset's name.
        title: method, model and tasks, in words.
        source: where it is published.
        figures: accuracies in percent by task, and under `average`.
        tolerance: how far ours may be from a task's figure, in points, either way.
        tolerance_average: the same for the average.
        evaluated_with: the routing that it was scored with, or None for a static model.
        baseline: the baseline whose scores are compared, where it is not the method's own.
        note: what a reader must know.
    """

    name: str
    title: str
    source: str
    figures: Mapping[str, float]
    tolerance: float
    tolerance_average: float
    evaluated_with: str | None = None
    baseline: str | None = None
    note: str | None = None

    @property
    def tasks(self) -> list[str]:
        """The tasks that have a figure of their own."""
        return [name for name in self.figures if name != AVERAGE]


@dataclass(frozen=True)
class Figure:
    """One line of the comparison.

    Attributes:
        task: a task, or `average`.
        published: the published accuracy, where there is one.
        ours: ours by column; None where the task was not scored.
        difference: ours less the published one, in points.
        within: whether that is within the tolerance; None where nothing is published.
    """

    task: str
    published: float | None
    ours: Mapping[str, float | None]
    difference: float | None
    within: bool | None


def published_row(name: str, table: Any) -> PublishedRow:
    """Return the row that a preset's table `reproduction` describes.

    Args:
        name: the preset's name.
        table: as in `config/reproduction/*.yaml`.

    Raises:
        ConfigError: if a key is unknown or missing, or a figure is not in percent.
    """
    table = _table(table, "reproduction")
    for key in table:
        if key not in _KEYS:
            raise ConfigError(f"`reproduction.{key}` is not a key of a published row; {nearest(str(key), _KEYS)}")
    figures = {str(task): _number(table["published"][task], f"published.{task}", 100) for task in _published(table)}
    tolerance = _table(table.get("tolerance"), "reproduction.tolerance")
    routing = table.get("evaluated_with")
    if routing not in (None, *ROUTINGS):
        raise ConfigError(f"`reproduction.evaluated_with`={routing!r} is not a routing; choose batch, sample or null")
    return PublishedRow(
        name=name,
        title=str(table.get("title") or name),
        source=str(table.get("source") or "not said"),
        figures=figures,
        tolerance=_number(tolerance.get("task"), "tolerance.task", 100),
        tolerance_average=_number(tolerance.get(AVERAGE), "tolerance.average", 100),
        evaluated_with=routing,
        baseline=table.get("baseline"),
        note=table.get("note"),
    )


def compare(row: PublishedRow, columns: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> list[Figure]:
    """Compare what was measured with what is published, task by task, the average last.

    Args:
        row: what is published.
        columns: evaluation reports by the name of the column; the first is the one that is compared.
        tasks: the tasks that the published average is over; ours is the mean over the same, if all were scored.
    """
    lines = []
    for task in [*dict.fromkeys((*tasks, *row.tasks)), AVERAGE]:
        ours = {name: _percent(report, [task] if task != AVERAGE else tasks) for name, report in columns.items()}
        published, first = row.figures.get(task), next(iter(ours.values()))
        difference = None if published is None or first is None else first - published
        allowed = row.tolerance_average if task == AVERAGE else row.tolerance
        within = None if published is None else difference is not None and abs(difference) <= allowed + _ROUNDING
        lines.append(Figure(task, published, ours, difference, within))
    return lines


def agrees(figures: Sequence[Figure]) -> bool:
    """Tell whether everything that is published is met within its tolerance.

    Args:
        figures: what `compare` returned.
    """
    return all(figure.within for figure in figures if figure.published is not None)


def verdict(row: PublishedRow, figures: Sequence[Figure]) -> str:
    """Return the outcome in one line.

    Args:
        row: what is published.
        figures: what `compare` returned.
    """
    allowed = f"±{row.tolerance_average:g} points on the average, ±{row.tolerance:g} on a task"
    if agrees(figures):
        return f"within tolerance ({allowed})"
    missed = [f"{f.task} {_signed(f.difference) or 'not scored'}" for f in figures if f.within is False]
    return f"NOT within tolerance ({allowed}): {', '.join(missed)}"


def comparison_table(figures: Sequence[Figure], *, style: str = "simple") -> str:
    """Return the table task | published | ours … | difference | within tolerance.

    Args:
        figures: what `compare` returned.
        style: a format of tabulate, such as `simple` or `github`.
    """
    columns = [f"ours ({name})" if name else "ours" for name in figures[0].ours]
    rows = [
        [f.task, _shown(f.published), *map(_shown, f.ours.values()), _signed(f.difference), _answer(f.within)]
        for f in figures
    ]
    headers = ["task", "published", *columns, "difference", "within tolerance"]
    return tabulate(rows, headers=headers, tablefmt=style, stralign="right", disable_numparse=True)


def rows_table(presets: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table of the rows that there are, with their titles and published averages.

    Args:
        presets: what the files of the group `reproduction` say, by name.
    """
    described = {name: preset.get("reproduction") or {} for name, preset in presets.items()}
    rows = [
        [name, table.get("title", ""), _shown((table.get("published") or {}).get(AVERAGE))]
        for name, table in described.items()
    ]
    return tabulate(rows, headers=["name", "row", "average"], colalign=("left", "left", "right"), disable_numparse=True)


def plain_figures(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """Return a comparison as plain values, accuracies and differences rounded to four digits.

    Args:
        figures: what `compare` returned.
    """
    return [_rounded(asdict(figure)) for figure in figures]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def _table(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"`{key}`={value!r} is not a table; see `config/reproduction` for what a row has")
    return value


def _published(table: Mapping[str, Any]) -> Mapping[str, Any]:
    published = _table(table.get("published"), "reproduction.published")
    if not published:
        raise ConfigError("`reproduction.published` is empty; give the accuracy in percent by task, or the `average`")
    return published


def _number(value: Any, key: str, limit: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= limit:
        raise ConfigError(f"`reproduction.{key}`={value!r} is not a number of percent in 0-{limit}")
    return float(value)


def _percent(report: Mapping[str, Any], tasks: Sequence[str]) -> float | None:
    if not tasks or any(task not in report for task in tasks):
        return None
    return 100 * sum(float(report[task]["accuracy"]) for task in tasks) / len(tasks)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.2f}"


def _answer(within: bool | None) -> str:
    return "" if within is None else "yes" if within else "NO"
