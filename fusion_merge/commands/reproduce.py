"""`fusion_merge reproduce NAME`: run a published row, and say how ours compares; without a name, list the rows."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion_merge.composition import chosen_preset, composed, preset_files
from fusion_merge.errors import ConfigError
from fusion_merge.files import write_text
from fusion_merge.report.departures import Departures, departures
from fusion_merge.report.published import (
    Figure,
    PublishedRow,
    agrees,
    compare,
    comparison_table,
    plain_figures,
    published_row,
    rows_table,
    verdict,
)

log = logging.getLogger(__name__)

GROUP = "reproduction"
WITHIN, NOT_WITHIN = 0, 3
"""Exit codes; 1 is an error's, and 2 that of arguments which are none."""


def run(config: Mapping[str, Any], output_dir: Path, typed: str) -> int:
    """See `Command.run`: 0 if ours is within the tolerance, 3 if it is not."""
    if config[GROUP] is None:
        log.info("%s\n\nrun one with `fusion_merge reproduce NAME`", rows_table(preset_files(GROUP)))
        return WITHIN
    name = chosen_preset(GROUP)
    row = published_row(name, config[GROUP])
    _check_scored(row, config)
    if config["protocol"] is not None and not str(config["protocol"].get("_target_")).endswith(".SweepProtocol"):
        raise ConfigError(f"a published row is one run, and `protocol` makes several of `{name}`; leave it out")
    recipe = composed(f"{GROUP}={name}")
    found = departures(recipe, config)
    tasks = _tasks(recipe)

    from fusion_merge.program import FusionProgram  # only now: it takes seconds, and the list needs none of it

    program = FusionProgram(config, output_dir, typed)
    if config["dry_run"]:
        program.check()
        log.info("%s\n%s\ndry run: nothing was computed or written", program.plan(), "\n".join(_about(row, found)))
        return WITHIN
    report = program.run()
    adaptation = report["run"].get("adaptation")
    if adaptation and adaptation["interrupted"]:
        found.changes.append(f"adaptation interrupted after {adaptation['steps']} steps")
    if not program.is_global_zero:
        return WITHIN  # one process speaks for all
    figures = compare(row, _columns(row, report), tasks)
    _write(output_dir, row, figures, found, report["run"])
    lines = [*_about(row, found), verdict(row, figures), f"comparison in {output_dir / 'reproduction.md'}"]
    log.info("\n%s\n\n%s", comparison_table(figures), "\n".join(lines))
    return WITHIN if agrees(figures) else NOT_WITHIN


def _tasks(recipe: Mapping[str, Any]) -> list[str]:
    """Return the tasks that the recipe scores; a task pool without any scores those of the model pool."""
    pool = recipe["taskpool"]
    return [*(pool.get("tasks") or {}), *(pool.get("test_datasets") or {})] or [
        *(recipe["modelpool"].get("test_datasets") or {})
    ]


def _check_scored(row: PublishedRow, config: Mapping[str, Any]) -> None:
    """Refuse a run that would not score what is to be compared."""
    routings, baselines = config["evaluate_routings"] or [], config["baselines"]
    if row.baseline is not None and row.baseline not in baselines:
        raise ConfigError(
            f"`baselines`={baselines}: the figures of `{row.name}` are those of the baseline `{row.baseline}`; "
            "add it, or leave `baselines` out"
        )
    if row.evaluated_with is not None and row.evaluated_with not in routings:
        raise ConfigError(
            f"`evaluate_routings`={routings}: the figures of `{row.name}` were scored with {row.evaluated_with} "
            f"routing; add `{row.evaluated_with}`, or leave `evaluate_routings` out"
        )
    if str(config["taskpool"].get("_target_")).endswith("DummyTaskPool"):
        raise ConfigError(f"`taskpool=dummy` scores nothing to compare with `{row.name}`; leave it out")


def _columns(row: PublishedRow, report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the reports to show by the names of their columns, that which is compared first."""
    if row.baseline is not None:
        return {"": report["baselines"].get(row.baseline, {})}
    own = report["run"]["evaluation"]["routing"]
    if row.evaluated_with is None:
        return {f"{own} routing" if own else "": report}
    scored = {own: report, **report.get("routings", {})}
    order = sorted(scored, key=lambda routing: routing != row.evaluated_with)
    return {f"{routing} routing": scored[routing] for routing in order}


def _about(row: PublishedRow, found: Departures) -> list[str]:
    """Return what a reader of the comparison must know, a line each."""
    lines = [f"published  {row.title}", f"source     {row.source}"]
    lines += [f"note       {row.note}"] if row.note else []
    lines += [f"not the published recipe: {change}" for change in found.changes]
    return lines + [f"taken for a copy of what was published: {copy}" for copy in found.copies]


def _write(
    folder: Path, row: PublishedRow, figures: Sequence[Figure], found: Departures, run: Mapping[str, Any]
) -> None:
    from fusion_merge.report.provenance import provenance_tables

    outcome = verdict(row, figures)
    content = {
        "name": row.name,
        "title": row.title,
        "source": row.source,
        "note": row.note,
        "evaluated_with": row.evaluated_with,
        "baseline": row.baseline,
        "tolerance": {"average": row.tolerance_average, "task": row.tolerance},
        "figures": plain_figures(figures),
        "within_tolerance": agrees(figures),
        "verdict": outcome,
        "departures": found.changes,
        "copies": found.copies,
        "run": {key: value for key, value in run.items() if key != "routing"},
    }
    write_text(folder / "reproduction.json", json.dumps(content, indent=2, default=str))
    about = "\n".join(f"- {line}" for line in _about(row, found))
    table = comparison_table(figures, style="github")
    parts = [f"# {row.title}", f"    {run['command']}", f"**{outcome}**", "Accuracy in percent.", table]
    scoring = run["evaluation"]
    batches = f"Scored in batches of {scoring['batch_size']}, by {scoring['processes']} process(es)."
    parts += [about, batches, provenance_tables(dict(run))]
    write_text(folder / "reproduction.md", "\n\n".join(parts) + "\n")
