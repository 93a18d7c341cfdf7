"""Tables and the written report of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate

from fusion_merge.pools.model_pool import PRETRAINED
from fusion_merge.report.adaptation import adaptation_notes

Column = Mapping[str, Any]
"""An evaluation report: for each task, and for `average`, its `accuracy`."""


def columns_of(report: Mapping[str, Any]) -> dict[str, Column]:
    """Return what a report has scores of, by title.

    These are the baselines, the method, the method under other routings, and where it is not told the tasks.

    Args:
        report: a whole report, with its `run` and `baselines` parts.
    """
    method = report["run"]["method"]
    columns: dict[str, Column] = {**{n.replace("_", " "): r for n, r in report["baselines"].items()}, method: report}
    columns |= {f"{method} ({n} routing)": r for n, r in report.get("routings", {}).items()}
    return columns | ({f"{method} (unknown task)": report["unknown_task"]} if "unknown_task" in report else {})


def accuracy_table(
    columns: Mapping[str, Column],
    tasks: Sequence[str],
    *,
    style: str = "simple",
    groups: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """Return a table of tasks × models with accuracies in percent, the average last.

    Args:
        columns: for each model, its evaluation report; a task that it lacks is left blank.
        tasks: the rows.
        style: a format of tabulate, such as `simple` or `github`.
        groups: tasks whose average has a row of its own, by what they are called.
    """
    rows = [[task, *(percent(column.get(task)) for column in columns.values())] for task in tasks]
    means = {f"{name} average": group for name, group in (groups or {}).items()} | {"average": tasks}
    rows += [[name, *(percent(average(c, group)) for c in columns.values())] for name, group in means.items()]
    return tabulate(rows, headers=["task", *columns], tablefmt=style, stralign="right", disable_numparse=True)


def average(column: Column, tasks: Sequence[str]) -> dict[str, float] | None:
    """Return the mean scores over some tasks, if the column has all of them: means of other tasks do not compare.

    Args:
        column: an evaluation report.
        tasks: the tasks, at least one.
    """
    if any(task not in column for task in tasks):
        return None
    keys = [key for key in ("accuracy", "loss") if all(key in column[task] for task in tasks)]
    return {key: sum(column[task][key] for task in tasks) / len(tasks) for key in keys}


def percent(score: Mapping[str, float] | None) -> str:
    """Return an accuracy in percent, or nothing where there is none.

    Args:
        score: scores, `accuracy` among them.
    """
    return "" if score is None else f"{100 * score['accuracy']:.1f}"


def model_size(info: Mapping[str, float]) -> str:
    """Return one line about the size of a model.

    Args:
        info: what `model_info` returned.
    """
    return (
        f"{info['all_params']:,} parameters, {info['trainable_params']:,} of them trainable "
        f"({100 * info['trainable_percentage']:.2f} %)"
    )


def written_report(report: Mapping[str, Any], table: str, pictures: Sequence[str]) -> str:
    """Return the report of a run in Markdown.

    Args:
        report: the whole report, with its `run` part.
        table: the accuracy table in Markdown.
        pictures: file names of pictures, relative to the report.
    """
    run = report["run"]
    lines = [f"# {run['method']}", "", f"    {run['command']}", ""]
    if table:
        lines += ["Accuracy in percent.", "", table, ""]
    if "unknown_task" in report:
        found = report["unknown_task"]
        lines += [
            f"Where the task is unknown, the model finds it by {found['by']}, for "
            f"{100 * found['average']['task_accuracy']:.1f} % of the images; a class counts only if its task is right.",
            "",
        ]
    for task, score in report.items():
        if isinstance(score, dict) and score.get("skipped"):
            lines += [f"`{task}`: {score['skipped']} bad images are left out of the scores.", ""]
    if "model_info" in report:
        lines += [model_size(report["model_info"]) + ".", ""]
    adaptation = run.get("adaptation")
    if adaptation:
        end = ", ended early by an interrupt" if adaptation["interrupted"] else ""
        begun = adaptation.get("resumed_at")
        resumed = f", going on from step {begun} of an earlier run" if begun else ""
        split = run.get("options", {}).get("tta_split", "test")
        images = "" if split == "test" else f" on the split `{split}`, which is not what is scored"
        lines += [
            f"Adapted for {adaptation['steps']} steps in {adaptation['seconds']:.1f} s{images}{resumed}{end}.",
            "",
        ]
        for note in adaptation_notes({**adaptation, "interrupted": False}):  # which was said
            lines += [f"**{note[0].upper()}{note[1:]}.**", ""]
    for picture in pictures:
        lines += [f"![{picture.removesuffix('.png')}]({picture})", ""]
    lines += ["| phase | seconds |", "|---|---|"]
    lines += [f"| {phase} | {seconds:.1f} |" for phase, seconds in run["seconds"].items()]
    lines += [
        "",
        *_how(run),
        f"Seed {run['seed']}; " + ", ".join(f"{k} {v}" for k, v in run["versions"].items()) + ".",
        "",
    ]
    return "\n".join(lines)


def _how(run: Mapping[str, Any]) -> list[str]:
    """Return paragraphs on the models and the options of a run, as one writes them."""
    models, options = ((run.get(part) or {}).items() for part in ("models", "options"))
    base = [f"base `{source}`" for name, source in models if name == PRETRAINED]
    merged = [f"{name} `{source}`" for name, source in models if name != PRETRAINED]
    chosen = [f"`{name}={_typed(value)}`" for name, value in options]
    parts = {"Models": base + merged, "Options": chosen}
    return [f"{what}: {', '.join(told)}.\n" for what, told in parts.items() if told]


def _typed(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
