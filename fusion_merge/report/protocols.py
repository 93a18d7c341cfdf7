"""Tables and written reports of several runs, or of several scores of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from fusion_merge.report.adaptation import adaptation_notes
from fusion_merge.report.tables import accuracy_table, average, columns_of, percent

CLEAN = "clean"
"""The condition in which images are as they are."""


def condition_averages(reports: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the average scores of each condition and model, and their mean over the corruptions, if there are any.

    Args:
        reports: for each condition, a whole report.
        tasks: the tasks; a model that lacks one has no average.
    """
    rows = {name: {title: average(c, tasks) for title, c in columns_of(r).items()} for name, r in reports.items()}
    corrupted = [row for name, row in rows.items() if name != CLEAN]
    if corrupted:
        rows["mean of corruptions"] = {title: _mean([row.get(title) for row in corrupted]) for title in corrupted[0]}
    return rows


def _mean(scores: Sequence[Mapping[str, float] | None]) -> dict[str, float] | None:
    known = [s for s in scores if s is not None]
    return {k: sum(s[k] for s in known) / len(known) for k in known[0]} if len(known) == len(scores) else None


def condition_table(averages: Mapping[str, Mapping[str, Any]], *, style: str = "simple") -> str:
    """Return a table of conditions × models with average accuracies in percent.

    Args:
        averages: what `condition_averages` returned.
        style: a format of tabulate, such as `simple` or `github`.
    """
    titles = list(next(iter(averages.values())))
    rows = [[name.replace("_", " "), *(percent(row[title]) for title in titles)] for name, row in averages.items()]
    return tabulate(rows, headers=["condition", *titles], tablefmt=style, stralign="right", disable_numparse=True)


def robustness_report(report: Mapping[str, Any], tasks: Sequence[str]) -> str:
    """Return the report of the robustness protocol in Markdown.

    Args:
        report: the whole report, with its `run`, `averages` and `conditions` parts.
        tasks: the tasks.
    """
    run = report["run"]
    lines = [f"# {run['method']}: robustness", "", f"    {run['command']}", "", "Average accuracy in percent.", ""]
    lines += [condition_table(report["averages"], style="github"), "", run["images"], ""]
    lines += [line for remark in remarks(report) for line in (f"**{remark}.**", "")]
    for name, condition in report["conditions"].items():
        lines += [f"## {name.replace('_', ' ')}", ""]
        lines += [accuracy_table(columns_of(condition), tasks, style="github"), "", f"[report]({name}/report.md)", ""]
    versions = ", ".join(f"{k} {v}" for k, v in run["versions"].items())
    lines += [f"{run['seconds']:.1f} seconds. Seed {run['seed']}; {versions}.", ""]
    return "\n".join(lines)


def remarks(report: Mapping[str, Any]) -> list[str]:
    """Return what a reader must know of single conditions: adaptation that ended early or collapsed, images left out.

    Args:
        report: as in `robustness_report`.
    """
    found = []
    for name, condition in report["conditions"].items():
        found += [f"{name}: {note}" for note in adaptation_notes(condition["run"].get("adaptation"))]
        for task, score in condition.items():
            if isinstance(score, Mapping) and score.get("skipped"):
                found.append(f"{name}: {score['skipped']} bad images of `{task}` are left out of the scores")
    return found


def sweep_table(rows: Sequence[Mapping[str, Any]], options: Sequence[str], *, style: str = "simple") -> str:
    """Return a table of the jobs of a sweep, the best marked.

    Args:
        rows: for each job, its number `job`, the values of `options`, and its scores or its `error`.
        options: the options that are swept.
        style: a format of tabulate, such as `simple` or `github`.
    """
    headers = ["job", *options, "accuracy", "worst task", "loss", "seconds", "report"]
    body = [[str(row["job"]), *(str(row["options"].get(o, "")) for o in options), *_outcome(row)] for row in rows]
    return tabulate(body, headers=headers, tablefmt=style, stralign="right", disable_numparse=True)


def _outcome(row: Mapping[str, Any]) -> list[str]:
    seconds = f"{row['seconds']:.1f}"
    if row["error"] is not None:
        return ["failed", "", "", seconds, " ".join(row["error"].split()).replace("|", "/")]
    if row["accuracy"] is None:
        return ["", "", "", seconds, row["report"] or ""]
    accuracy = f"{100 * row['accuracy']:.1f}" + (" (best)" if row["best"] else "")
    worst = f"{row['worst_task']} {100 * row['worst_accuracy']:.1f}"
    return [accuracy, worst, f"{row['loss']:.3f}", seconds, row["report"]]
