"""Several methods on one model pool: each made, scored, saved and timed in the same way, side by side."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from fusion_merge.adaptation.runtime import Fabric, make_fabric, placement_of
from fusion_merge.errors import ConfigError, FusionMergeError, reason
from fusion_merge.files import check_writable, write_text
from fusion_merge.models.task_models import TaskModels
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool
from fusion_merge.processes import in_company, together
from fusion_merge.program import FusionProgram, Report
from fusion_merge.protocols.measuring import accuracies_of, kind_of, measured, weigh
from fusion_merge.report.comparison import (
    Row,
    accuracies_table,
    comparison_csv,
    comparison_notes,
    costs_table,
    plain_rows,
    written_comparison,
)
from fusion_merge.report.comparison_plot import comparison_picture
from fusion_merge.report.costs import inference_cost, sample_images
from fusion_merge.report.provenance import machine, versions

log = logging.getLogger(__name__)

_NAME = "comparison"
_BASELINES = ("zero_shot", "fine_tuned")


@dataclass(frozen=True)
class Outcome:
    """What came of a comparison.

    Attributes:
        rows: baselines first, then the methods, in order.
        failed: whether any method has no result.
        interrupted: whether it was ended by Ctrl-C; later methods have no row then.
    """

    rows: list[Row]
    failed: bool
    interrupted: bool


@final
class Comparison:
    """Several methods on one pool; each has its own report in a subfolder, and one report has them all.

    Args:
        configs: for each method, the configuration of a run of it; pools, tasks and Fabric are those of the first.
        output_dir: where the report of all goes, and the subfolders.
        command: the command that started it, for the report.

    Raises:
        FusionMergeError: if a configuration does not hold together.
    """

    def __init__(self, configs: Mapping[str, Mapping[str, Any]], output_dir: Path, command: str) -> None:
        self.config = next(iter(configs.values()))
        self.output_dir, self.command = output_dir, command
        self.batch_size: int = self.config["compare"]["batch_size"]
        if self.batch_size < 1:
            raise ConfigError(f"`compare.batch_size`={self.batch_size} is below 1; choose at least 1")
        self.programs: dict[str, FusionProgram] = {}
        for name, config in configs.items():
            self.programs[name] = FusionProgram(self._own(name, config), self._folder(name), command)
        self.usual = next(iter(self.programs.values()))
        if not isinstance(self.usual.taskpool, CLIPVisionModelTaskPool):
            raise ConfigError("`compare` needs tasks to score on; choose another `taskpool`")
        self.taskpool: CLIPVisionModelTaskPool = self.usual.taskpool
        for program in self.programs.values():
            program.share(self.usual)
        self.problems: dict[str, str] = {}
        """What keeps single methods from being run, by their names; known once `check` was called."""

    def _folder(self, name: str) -> Path:
        return self.output_dir / name.replace("/", "_")

    def _own(self, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the configuration of one method's run: models are saved and baselines scored here, once for all."""
        elsewhere = ("protocol", "report_save_path", "merged_model_save_path", "evaluate_routings", "unknown_task")
        none = dict.fromkeys(elsewhere)
        return {**config, **none, "baselines": [], "output_dir": str(self._folder(name))}

    @property
    def baselines(self) -> list[str]:
        """The baselines that have rows."""
        return [b for b in _BASELINES if b in self.config["baselines"] and (b == "zero_shot" or self._several)]

    @property
    def _several(self) -> bool:
        return len(self.usual.modelpool.model_names) > 1

    @property
    def _kept(self) -> Path | None:
        folder = self.config["merged_model_save_path"]
        return Path(folder).expanduser() if folder else None

    def check(self) -> None:
        """Check everything of every method, before anything is computed; `problems` then holds those of single ones.

        Raises:
            FusionMergeError: if something is wrong that all share, or no method can be run.
        """
        for key in ("report_save_path", "merged_model_save_path"):
            if self.config[key]:
                check_writable(self.config[key], key, kind="folder" if key == "merged_model_save_path" else "file")
        self.problems = {}
        errors: list[FusionMergeError] = []
        for name, program in self.programs.items():
            try:
                program.check()
            except FusionMergeError as error:
                errors.append(error)
                self.problems[name] = str(error)
        if len(errors) == len(self.programs):
            raise errors[0]

    def plan(self) -> str:
        """Return what is about to be done, in words."""
        lines = [line for line in self.usual.plan().splitlines() if not line.startswith(("method", "output"))]
        methods = [f"{n} (cannot run: {self.problems[n]})" if n in self.problems else n for n in self.programs]
        lines = [f"compare    {len(methods)} methods", *(f"           {method}" for method in methods), *lines]
        return "\n".join([*lines, f"baselines  {', '.join(self.baselines) or 'none'}", f"output     {self.output_dir}"])

    def run(self) -> Outcome:
        """Make, score and measure every method, and write what is known after each.

        Raises:
            FusionMergeError: if something is wrong that all share; of several processes, also if one method fails.
        """
        self.check()
        fabric = make_fabric(**self.config["fabric"])
        rows: list[Row] = []
        interrupted = False
        with in_company():
            if fabric.is_global_zero:
                log.info("%s\n", self.plan())
            try:
                for name in (*self.baselines, *self.programs):
                    row = self._baseline(name, fabric) if name not in self.programs else self._row(name, fabric)
                    rows.append(row)
                    self._free(fabric)
                    self._write(rows, fabric)
                    if interrupted := self._was_interrupted(name):
                        break
            except KeyboardInterrupt:
                interrupted = True
            self._finish(rows, fabric, interrupted)
        return Outcome(rows, any(row.error is not None for row in rows), interrupted)

    def _was_interrupted(self, name: str) -> bool:
        record = getattr(self.programs[name].method, "record", None) if name in self.programs else None
        return record is not None and record.interrupted

    @cached_property
    def _pixels(self) -> Tensor:
        return sample_images(self.taskpool, self.batch_size)

    def _cost(self, model: nn.Module | TaskModels, fabric: Fabric) -> float:
        plain = self.usual.modelpool.load_pretrained_model()
        quick = bool(self.config["fast_dev_run"])
        return inference_cost(model, plain, self._pixels, placement_of(fabric), quick=quick)

    def _baseline(self, name: str, fabric: Fabric) -> Row:
        pool = self.usual.modelpool
        tasks = [t for t in self.taskpool.task_names if name == "zero_shot" or t in pool.model_names]
        with together():
            model = pool.load_pretrained_model() if name == "zero_shot" else pool.fine_tuned_models()
        scores = self.taskpool.evaluate(model, placement=placement_of(fabric), tasks=tasks, label=f"scoring {name}")
        row = Row(name=name, kind="baseline", accuracies=accuracies_of(scores, tasks), cost=1.0)
        with together():
            if fabric.is_global_zero:
                weigh(row, model, self.output_dir)
        return row

    def _row(self, name: str, fabric: Fabric) -> Row:
        """Return what comes of a method; one that fails does not end the others."""
        if name in self.problems:
            log.warning("%s cannot run: %s", name, self.problems[name])
            return Row(name=name, kind=kind_of(self.programs[name].method, None), error=self.problems[name])
        done = len(self.baselines) + list(self.programs).index(name)
        if fabric.is_global_zero:
            log.info("\n%s (%d of %d)", name, done + 1, len(self.baselines) + len(self.programs))
        try:
            return self._measured(name, fabric)
        except Exception as error:  # whatever it is, the other methods go on
            if fabric.world_size > 1:  # the other processes may be elsewhere
                raise
            foreseen = isinstance(error, FusionMergeError)
            log.error("%s failed: %s", name, error, exc_info=not foreseen)
            message = str(error) if foreseen else reason(error)
            return Row(name=name, kind=kind_of(self.programs[name].method, None), error=message or type(error).__name__)

    def _measured(self, name: str, fabric: Fabric) -> Row:
        program = self.programs[name]
        kept = self._kept / name.replace("/", "_") if self._kept is not None else None
        row, model = measured(program, name, fabric, keep=kept)
        with together():
            if fabric.is_global_zero:
                row.cost = self._cost(model, fabric)
        return row

    def _free(self, fabric: Fabric) -> None:
        gc.collect()
        if fabric.device.type == "cuda":
            torch.cuda.empty_cache()

    def _write(self, rows: Sequence[Row], fabric: Fabric, picture: str | None = None) -> None:
        if not fabric.is_global_zero:
            return
        tasks = self.taskpool.task_names
        made = [row.name for row in rows if row.error is None and row.name in self.programs]
        about: Report = {
            "command": self.command,
            "seed": self.config["seed"],
            "batch_size": len(self._pixels) if "_pixels" in vars(self) else self.batch_size,
            "device": str(fabric.device),
            "models": {n: self.usual.modelpool.describe(n) for n in self.usual.modelpool.all_model_names},
            "reports": {name: f"{self._folder(name).name}/report.md" for name in made},
            "versions": versions(),
            "machine": machine(),
        }
        text = json.dumps({"tasks": tasks, "rows": plain_rows(rows, tasks), "run": about}, indent=2, default=str)
        for place in (self.output_dir / f"{_NAME}.json", self.config["report_save_path"]):
            if place:
                write_text(place, text)
        write_text(self.output_dir / f"{_NAME}.csv", comparison_csv(rows, tasks))
        write_text(self.output_dir / f"{_NAME}.md", written_comparison(rows, tasks, about, picture))

    def _finish(self, rows: Sequence[Row], fabric: Fabric, interrupted: bool) -> None:
        if not fabric.is_global_zero or not rows:
            return
        tasks = self.taskpool.task_names
        picture = self.output_dir / f"{_NAME}.png"
        picture.unlink(missing_ok=True)
        if find_spec("matplotlib") is None:
            log.info("no picture without matplotlib: pip install 'fusion_merge[plot]'")
        elif any(row.megabytes and row.average(tasks) is not None for row in rows):
            comparison_picture(picture, rows, tasks)
        self._write(rows, fabric, picture.name if picture.is_file() else None)
        log.info("\naccuracy in percent\n%s\n\n%s", accuracies_table(rows, tasks), costs_table(rows, tasks))
        for note in comparison_notes(rows):
            log.warning("%s", note)
        if interrupted:
            log.warning("interrupted: %d of %d rows", len(rows), len(self.baselines) + len(self.programs))
        log.info("\ncomparison in %s", self.output_dir / f"{_NAME}.md")
