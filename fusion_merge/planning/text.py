"""A plan as a text of aligned columns, and as plain values."""

from __future__ import annotations

import dataclasses
from typing import Any

from tabulate import tabulate

from fusion_merge.planning.geometry import ModelSize
from fusion_merge.planning.plan import Plan

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def plan_text(plan: Plan) -> str:
    """Return a plan in words and tables.

    Args:
        plan: the plan.
    """
    processes = f", {plan.processes} processes" if plan.processes > 1 else ""
    runs = f", adapted and scored {plan.runs} times" if plan.runs > 1 else ""
    blocks = [f"{plan.method} on {plan.device}{processes}{runs}", _tasks(plan)]
    if plan.model is not None:
        blocks += [_model(plan), _memory(plan), _disk(plan), _time(plan)]
    blocks += [f"warning: {warning}" for warning in plan.warnings]
    if plan.problems:
        number = len(plan.problems)
        head = f"{number} problem{'s' if number > 1 else ''}: the run cannot start"
        blocks.append("\n".join([head, *(f"  - {problem}" for problem in plan.problems)]))
    else:
        blocks.append("no problems: the run can start")
    return "\n\n".join(block for block in blocks if block)


def plan_values(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain JSON values; sizes are in bytes, times in seconds.

    Args:
        plan: the plan.
    """
    values = dataclasses.asdict(plan)
    values["can_start"] = not plan.problems
    values["phases"] = {p.name: {"host": p.host, "device": p.device} for p in plan.phases}
    for phase, table in zip(plan.phases, values["phases"].values(), strict=True):
        table |= {"host_bytes": phase.host_bytes, "device_bytes": phase.device_bytes}
    values["peak"] = {"host_bytes": plan.peak, "device_bytes": plan.device_peak}
    for writing in values["writings"]:
        del writing["disk"]
    return values


def size(number: float) -> str:
    """Return a number of bytes in words.

    Args:
        number: how many.
    """
    for factor, unit in _UNITS:
        if number >= factor:
            digits = 2 if number < 10 * factor else 0 if unit != "GB" or number >= 100 * factor else 1
            return f"{number / factor:.{digits}f} {unit}"
    return f"{number:.0f} B"


def duration(seconds: float) -> str:
    """Return a time in words, no more exact than an estimate is.

    Args:
        seconds: how long.
    """
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _tasks(plan: Plan) -> str:
    rows = []
    for name, task in plan.tasks.items():
        adapted, scored = (
            f"{task[verb]:,} ({task[f'{verb}_on']})" if verb in task else "" for verb in ("adapted", "scored")
        )
        rows.append([name, task.get("classes", "?"), adapted, scored, task["model"] or ""])
    headers = ["task", "classes", "images to adapt on", "images scored", "model"]
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", "right", "right", "right", "left"))


def _model(plan: Plan) -> str:
    model = plan.model
    if model is None:
        return ""
    rows = [["parameters", f"{model.parameters:,}"]]
    if model.kind is not None:
        share = 100 * model.trainable / model.parameters
        rows += [
            ["trainable", f"{model.trainable:,} ({share:.2f} %)"],
            ["experts", f"{model.experts:,} ({model.kind.replace('_', ' ')})"],
            ["routers", size(model.router_bytes)],
        ]
    rows.insert(-1 if model.kind else 1, ["in memory and on disk", f"{size(model.bytes)}{_held(model)}"])
    return tabulate([["model", "", ""], *(["", *row] for row in rows)], tablefmt="plain", disable_numparse=True)


def _held(model: ModelSize) -> str:
    """Return how much of a model is no weight of its tower."""
    held = {"heads": model.head_bytes, "what routers read": model.input_bytes}
    parts = [f"{what} {size(part)}" for what, part in held.items() if part]
    return f", of which {', '.join(parts)}" if parts else ""


def _memory(plan: Plan) -> str:
    gpu = bool(plan.device_peak)
    rows = []
    for phase in plan.phases:
        there = {what: part for what, part in (phase.device or phase.host).items() if part >= 5e6}
        parts = ", ".join(f"{what} {part / 1e9:.2f}" for what, part in there.items())
        rows.append([phase.name, _gb(phase.host_bytes), *([_gb(phase.device_bytes)] if gpu else []), parts])
    rows.append(["over all", _gb(plan.peak), *([_gb(plan.device_peak)] if gpu else []), ""])
    where = [f"GB on {plan.device}"] if gpu else []
    sides = ("left", "right", *(["right"] if gpu else []), "left")
    table = tabulate(rows, headers=["memory", "GB", *where, "of which"], disable_numparse=True, colalign=sides)
    free = [f"{size(amount)} free on the {where}" for where, amount in plan.available.items() if amount is not None]
    beside = [f"{size(plan.workers_bytes)} more in processes that read images"] if plan.workers_bytes else []
    return "\n".join([table, "; ".join([*beside, *free])])


def _gb(number: int) -> str:
    return f"{number / 1e9:.2f}"


def _disk(plan: Plan) -> str:
    rows = [[w.what, size(w.bytes), w.path, "?" if w.free is None else size(w.free)] for w in plan.writings]
    headers = ["disk", "at most", "where", "free there"]
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", "right", "left", "right"))


def _time(plan: Plan) -> str:
    if not plan.seconds:
        return ""
    rows = [[name, duration(seconds)] for name, seconds in plan.seconds.items()]
    rows.append(["in all", duration(sum(plan.seconds.values()))])
    table = tabulate(rows, headers=["time", "about"], disable_numparse=True, colalign=("left", "right"))
    return f"{table}\nan estimate from the speed of this machine just now, within a factor of about 2"
