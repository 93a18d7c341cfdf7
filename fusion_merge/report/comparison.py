"""Tables of several methods side by side, and the written report of a comparison."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate

KINDS = ("baseline", "static", "routed", "other")
"""What a row may be of: a baseline, one plain tower, a routed tower, or anything else, such as an ensemble."""


@dataclass(kw_only=True)
class Row:
    """One method, or one baseline; what is not known is None.

    Attributes:
        name: the method's name.
        kind: one of `KINDS`.
        accuracies: the share of right answers in 0-1, by task.
        trainable: parameters that were trained.
        stored: parameters that the model has.
        megabytes: 10⁶ bytes on disk.
        saved: whether those are of files; otherwise of the tensors in memory.
        build_seconds: the time that making the model took, without adaptation.
        adaptation_seconds: the time that adaptation took; None for what adapts nothing.
        cost: the time of a forward pass over that of the plain pretrained tower.
        options: the method's options.
        note: what a reader must know of it.
        error: why there is no result.
    """

    name: str
    kind: str = "static"
    accuracies: dict[str, float] = field(default_factory=dict)
    trainable: int | None = None
    stored: int | None = None
    megabytes: float | None = None
    saved: bool = True
    build_seconds: float | None = None
    adaptation_seconds: float | None = None
    cost: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    note: str | None = None
    error: str | None = None

    def average(self, tasks: Sequence[str]) -> float | None:
        """Return the mean accuracy, if there is one of each task: means of other tasks do not compare.

        Args:
            tasks: the tasks.
        """
        known = [self.accuracies[task] for task in tasks if task in self.accuracies]
        return sum(known) / len(tasks) if known and len(known) == len(tasks) else None

    def worst(self) -> tuple[str, float] | None:
        """Return the task with the lowest accuracy, and that."""
        return min(self.accuracies.items(), key=lambda item: item[1]) if self.accuracies else None


def accuracies_table(rows: Sequence[Row], tasks: Sequence[str], *, style: str = "simple") -> str:
    """Return a table of methods × tasks with accuracies in percent, average and worst task last.

    Args:
        rows: the methods.
        tasks: the tasks, in order.
        style: a format of tabulate, such as `simple` or `github`.
    """
    body = []
    for row in rows:
        if row.error is not None:
            body.append([row.name, *[""] * len(tasks), "failed", ""])
            continue
        worst = row.worst()
        shown = f"{worst[0]} {100 * worst[1]:.1f}" if worst else ""
        scores = [_percent(row.accuracies.get(task)) for task in tasks]
        body.append([row.name, *scores, _percent(row.average(tasks)), shown])
    headers = ["method", *tasks, "average", "worst task"]
    return tabulate(body, headers=headers, tablefmt=style, stralign="right", disable_numparse=True)


def costs_table(rows: Sequence[Row], tasks: Sequence[str], *, style: str = "simple") -> str:
    """Return a table of what each method costs, beside its average accuracy.

    Args:
        rows: the methods; those that failed are left out.
        tasks: the tasks that are averaged over.
        style: a format of tabulate, such as `simple` or `github`.
    """
    body = [
        [
            row.name,
            _percent(row.average(tasks)),
            _shown(row.trainable, ",d"),
            _shown(row.stored, ",d"),
            _shown(row.megabytes, ",.2f") + ("" if row.saved else "*"),
            _shown(row.build_seconds, ",.1f"),
            _shown(row.adaptation_seconds, ",.1f"),
            _shown(row.cost, ".2f"),
        ]
        for row in rows
        if row.error is None
    ]
    headers = ["method", "average", "trainable", "stored", "MB on disk", "build s", "adaptation s", "inference ×"]
    return tabulate(body, headers=headers, tablefmt=style, stralign="right", disable_numparse=True)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def comparison_notes(rows: Sequence[Row]) -> list[str]:
    """Return what a reader must know of single rows, a line each.

    Args:
        rows: the methods.
    """
    notes = [f"{row.name} failed: {' '.join(row.error.split())}" for row in rows if row.error is not None]
    notes += [f"{row.name}: {row.note}" for row in rows if row.note is not None]
    if unsaved := [row.name for row in rows if row.megabytes is not None and not row.saved]:
        notes.append(f"* {', '.join(unsaved)}: not one tower that could be saved; megabytes of its tensors in memory")
    return notes


def written_comparison(rows: Sequence[Row], tasks: Sequence[str], about: Mapping[str, Any], picture: str | None) -> str:
    """Return the report of a comparison in Markdown.

    Args:
        rows: the methods.
        tasks: the tasks.
        about: `command`, `seed`, `batch_size`, `versions`, and `reports`: where each method's own report is.
        picture: the picture's file name, if there is one.
    """
    tables = [f(rows, tasks, style="github") for f in (accuracies_table, costs_table)]
    parts = ["# Comparison", f"    {about['command']}", "Accuracy in percent.", tables[0]]
    parts += [f"![accuracy against size on disk]({picture})"] if picture else []
    explained = (
        "Trainable: parameters that were adapted. Stored: all that the result has. MB: 10⁶ bytes of "
        "the files of the saved model. Inference ×: time of a forward pass over that of the plain pretrained tower, "
        f"on {about['batch_size']} images, the median of measurements in turns."
    )
    parts += [tables[1], explained]
    if notes := comparison_notes(rows):
        parts.append("\n".join(f"- {note}" for note in notes))
    if about["reports"]:
        parts.append("Reports: " + ", ".join(f"[{name}]({path})" for name, path in about["reports"].items()) + ".")
    parts.append(f"Seed {about['seed']}; " + ", ".join(f"{k} {v}" for k, v in about["versions"].items()) + ".")
    return "\n\n".join(parts) + "\n"


def comparison_csv(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """Return the comparison as CSV: one line a method, accuracies in 0-1.

    Args:
        rows: the methods.
        tasks: the tasks.
    """
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    costs = ["trainable", "stored", "megabytes", "saved", "build_seconds", "adaptation_seconds", "cost", "error"]
    writer.writerow(["method", "kind", *tasks, "average", "worst_task", "worst_accuracy", *costs])
    for row in rows:
        worst = row.worst() or ("", "")
        scores = [row.accuracies.get(task, "") for task in tasks]
        average = row.average(tasks)
        values = [getattr(row, cost) for cost in costs]
        writer.writerow([row.name, row.kind, *scores, "" if average is None else average, *worst, *values])
    return file.getvalue()


def plain_rows(rows: Sequence[Row], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Return the rows as plain values, `average` and the worst task with them.

    Args:
        rows: the methods.
        tasks: the tasks.
    """
    plain = []
    for row in rows:
        worst = row.worst() or (None, None)
        added = {"average": row.average(tasks), "worst_task": worst[0], "worst_accuracy": worst[1]}
        plain.append(dataclasses.asdict(row) | added)
    return plain
