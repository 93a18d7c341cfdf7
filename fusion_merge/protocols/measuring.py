"""One method, made, scored and weighed as a row of a table of several."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fusion_merge.adaptation.runtime import Fabric, log_to
from fusion_merge.methods.base import Method
from fusion_merge.models.merged import MergedCLIPVisionModel
from fusion_merge.models.task_models import TaskModels
from fusion_merge.processes import together
from fusion_merge.program import FusionProgram
from fusion_merge.report.adaptation import adaptation_notes
from fusion_merge.report.comparison import Row
from fusion_merge.report.costs import is_tower, size_of


def measured(
    program: FusionProgram, name: str, fabric: Fabric, *, keep: Path | None = None
) -> tuple[Row, nn.Module | TaskModels]:
    """Run a program that is checked, and return what came of it, and its model.

    Args:
        program: the run; its report is written into its own folder.
        name: what the row is called.
        fabric: where to compute.
        keep: where to save the model; by default its files are removed once they are counted.
    """
    log_to(fabric, program.output_dir / "logs")
    model = program.make(fabric)
    report = program.report_on(model, fabric)
    adaptation = report["run"]["adaptation"]
    adapting = adaptation["seconds"] if adaptation else None
    row = Row(
        name=name,
        kind=kind_of(program.method, model),
        accuracies=accuracies_of(report, getattr(program.taskpool, "task_names", [])),
        build_seconds=max(program.seconds["method"] - (adapting or 0.0), 0.0),
        adaptation_seconds=adapting,
        options=program.method.options(),
        note=_note(adaptation),
    )
    with together():
        if fabric.is_global_zero:
            weigh(row, model, program.output_dir, keep=keep, command=program.command)
            if adaptation:  # which may have left a plain tower behind
                row.trainable = adaptation["trained"]
    return row, model


def weigh(
    row: Row, model: nn.Module | TaskModels, folder: Path, *, keep: Path | None = None, command: str = ""
) -> None:
    """Fill in how large a model is.

    Args:
        row: the row; its accuracies are known.
        model: the model.
        folder: where files that are only counted may be for a while.
        keep: as in `measured`.
        command: what made the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder, prefix=".saved_"))
    try:
        place = keep if keep is not None else temporary / "model"
        size = size_of(model, place, keep=keep is not None, scores=row.accuracies, command=command)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    row.trainable, row.stored, row.megabytes, row.saved = size.trainable, size.stored, size.megabytes, size.saved


def kind_of(method: Method, model: nn.Module | TaskModels | None) -> str:
    """Return of which kind a row is; see `KINDS`.

    Args:
        method: what made the model.
        model: the model, or None where there is none.
    """
    if method.routed or isinstance(model, MergedCLIPVisionModel):
        return "routed"
    return "static" if model is None or (isinstance(model, nn.Module) and is_tower(model)) else "other"


def accuracies_of(report: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, float]:
    """Return the accuracies in a report, by task.

    Args:
        report: scores.
        tasks: the tasks; those that the report lacks are left out.
    """
    return {task: report[task]["accuracy"] for task in tasks if task in report}


def _note(adaptation: Mapping[str, Any] | None) -> str | None:
    return "; ".join(adaptation_notes(adaptation)) or None
