"""`protocol=sweep`: several runs by Hydra's multirun, and one table of all at the end."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from hydra.experimental.callback import Callback

from fusion_merge.files import write_text
from fusion_merge.program import FusionProgram
from fusion_merge.protocols.base import Protocol
from fusion_merge.report.protocols import sweep_table

log = logging.getLogger(__name__)

RECORD = "job.json"
"""What each job leaves in its folder below the sweep's: its options and what came of it."""

_SCORES = ("accuracy", "worst_task", "worst_accuracy", "loss")


@final
@dataclass(kw_only=True)
class SweepProtocol(Protocol):
    """Each job is one run as usual; the table is made by `SweepTable`."""

    def program(self, config: Mapping[str, Any], output_dir: Path, command: str) -> FusionProgram:
        """See `Protocol.program`."""
        return FusionProgram(config, output_dir, command)


@final
class SweepTable(Callback):
    """A callback of Hydra: records each job, and writes `sweep.md`, `sweep.csv` and `sweep.json` after each one.

    Records are files, so that jobs may run in other processes; a job that failed has a row that says so.
    """

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        """Remember when the sweep began: records in the same folder may be older.

        Args:
            config: the configuration, Hydra's own part included.
            **kwargs: nothing that is needed.
        """
        self._start = time.time()

    def on_job_end(self, config: Any, job_return: Any, **kwargs: Any) -> None:
        """Record what came of a job.

        Args:
            config: the job's configuration, Hydra's own part included.
            job_return: what the job returned.
            **kwargs: nothing that is needed.
        """
        if os.environ.get("LOCAL_RANK", "0") != "0":  # another process of the same job
            return
        record: dict[str, Any] = {
            "job": int(config.hydra.job.num),
            "options": dict(_key_and_value(override) for override in config.hydra.overrides.task),
        }
        returned = job_return._return_value  # the public one raises what the job raised
        if not isinstance(returned, Mapping):
            returned = {"error": str(returned), "report": None, "seconds": 0.0}
        record |= {**returned, **_scores(returned["report"])}
        write_text(Path(config.hydra.runtime.output_dir) / RECORD, json.dumps(record, indent=2))
        self._write(config)

    def on_multirun_end(self, config: Any, **kwargs: Any) -> None:
        """Show the table.

        Args:
            config: the configuration, Hydra's own part included.
            **kwargs: nothing that is needed.
        """
        rows, options, folder = self._write(config)
        log.info("\n%s\n\nsweep in %s", sweep_table(rows, options), folder / "sweep.md")

    def _write(self, config: Any) -> tuple[list[dict[str, Any]], list[str], Path]:
        sweep_dir = Path(config.hydra.sweep.dir)
        records = [f for f in sweep_dir.rglob(RECORD) if f.stat().st_mtime >= self._start - 1]
        rows = sorted((json.loads(f.read_text(encoding="utf-8")) for f in records), key=lambda row: row["job"])
        options = swept(rows)
        scored = [row["accuracy"] for row in rows if row["accuracy"] is not None]
        for row in rows:
            row["options"] = {key: value for key, value in row["options"].items() if key in options}
            row["best"] = bool(scored) and row["accuracy"] == max(scored)
        named = config.output_dir if "output_dir" not in options else None  # by the user, for all jobs
        folder = Path(named or sweep_dir).expanduser()
        write_text(folder / "sweep.json", json.dumps(rows, indent=2))
        write_text(folder / "sweep.csv", _csv(rows, options))
        command = f"    {shlex.join(['fusion_merge', '--multirun', *config.hydra.overrides.task])}"
        lines = ["# Sweep", "", command, "", "Accuracy in percent.", "", sweep_table(rows, options, style="github"), ""]
        write_text(folder / "sweep.md", "\n".join(lines))
        return rows, options, folder


def swept(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the options whose values differ between jobs, in the order in which they were given.

    Args:
        rows: the jobs, each with its `options`.
    """
    keys = dict.fromkeys(key for row in rows for key in row["options"])
    return [key for key in keys if len({row["options"].get(key) for row in rows}) > 1]


def _key_and_value(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


def _scores(file: str | None) -> dict[str, Any]:
    """Return the scores in a job's report, None where it has none."""
    none: dict[str, Any] = dict.fromkeys(_SCORES)
    if file is None or not Path(file).is_file():
        return none
    report = json.loads(Path(file).read_text(encoding="utf-8"))
    tasks = {k: v for k, v in report.items() if isinstance(v, Mapping) and "accuracy" in v and k != "average"}
    if not tasks:
        return none
    worst = min(tasks, key=lambda task: tasks[task]["accuracy"])
    values = (report["average"]["accuracy"], worst, tasks[worst]["accuracy"], report["average"]["loss"])
    return dict(zip(_SCORES, values, strict=True))


def _csv(rows: Sequence[Mapping[str, Any]], options: Sequence[str]) -> str:
    file = io.StringIO(newline="")
    fields = ("best", *_SCORES, "seconds", "report", "error")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["job", *options, *fields])
    for row in rows:
        writer.writerow([row["job"], *(row["options"].get(o, "") for o in options), *(row[f] for f in fields)])
    return file.getvalue()
