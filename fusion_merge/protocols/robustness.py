"""`protocol=robustness`: adapt and score on corrupted images, one corruption after the other."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

from fusion_merge.adaptation.runtime import Fabric, log_to, make_fabric
from fusion_merge.errors import ConfigError, nearest
from fusion_merge.files import write_text
from fusion_merge.methods.built_once import BuiltOnce
from fusion_merge.methods.moe_base import MoEMethod
from fusion_merge.options import option
from fusion_merge.pools.corruptions import CONSTANTS, CORRUPTIONS, SEVERITY
from fusion_merge.pools.specs import with_corruption, with_split
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool
from fusion_merge.processes import in_company, together
from fusion_merge.program import FusionProgram, Report
from fusion_merge.protocols.base import Protocol
from fusion_merge.report.protocols import CLEAN, condition_averages, condition_table, remarks, robustness_report

log = logging.getLogger(__name__)


@final
@dataclass(kw_only=True)
class RobustnessProtocol(Protocol):
    """For each corruption: adapt on corrupted images without labels, and score on them; beside the baselines.

    Source: Yang et al., "AdaMerging", ICLR 2024, and Tang et al., "WEMoE", ICML 2024: four tasks, seven corruptions.
    """

    corruptions: list[str] | None = option(None, help="which; null takes all seven")
    clean: bool = option(True, help="also the images as they are")
    severity: int = option(SEVERITY, help="from weak to strong", minimum=1, maximum=5)
    constants: str = option("cifar-c", help="what a severity is", choices=tuple(CONSTANTS))
    source: str = option(
        "generated",
        help="corrupt the images here, or take the splits of the data that have the corruptions' names",
        choices=("generated", "splits"),
    )

    def __post_init__(self) -> None:
        """Check all options.

        Raises:
            ConfigError: if one is of the wrong type or out of range, or a corruption is unknown.
        """
        super().__post_init__()
        for name in self.corruptions or ():
            if name not in CORRUPTIONS:
                raise ConfigError(f"`protocol.corruptions` has {name!r}; {nearest(str(name), CORRUPTIONS)}")
        if self.source == "splits" and (self.severity, self.constants) != (SEVERITY, "cifar-c"):
            raise ConfigError(
                f"`protocol.severity`={self.severity} and `protocol.constants`={self.constants} are those of generated "
                "images; leave them out, or take `protocol.source=generated`"
            )
        if not self.conditions:
            raise ConfigError("`protocol.corruptions`=[] and `protocol.clean`=False leave nothing to do; give some")

    @property
    def conditions(self) -> list[str]:
        """What is scored: clean images, if asked for, and each corruption once."""
        names = list(CORRUPTIONS) if self.corruptions is None else list(dict.fromkeys(self.corruptions))
        return ([CLEAN] if self.clean else []) + names

    def program(self, config: Mapping[str, Any], output_dir: Path, command: str) -> RobustnessProgram:
        """See `Protocol.program`."""
        return RobustnessProgram(self, config, output_dir, command)


@final
class RobustnessProgram:
    """One run a condition, all of one routed model that is built once; each writes into a subfolder.

    Args:
        protocol: the options.
        config: the resolved configuration.
        output_dir: where the report of all goes, and the subfolders.
        command: the command that started the run, for the report.

    Raises:
        FusionMergeError: if the configuration does not hold together.
    """

    def __init__(self, protocol: RobustnessProtocol, config: Mapping[str, Any], output_dir: Path, command: str) -> None:
        self.protocol, self.config, self.output_dir, self.command = protocol, config, output_dir, command
        self.usual = FusionProgram(config, output_dir, command)
        if not isinstance(self.usual.taskpool, CLIPVisionModelTaskPool):
            raise ConfigError("`protocol=robustness` needs tasks to score on; choose another `taskpool`")
        self._tasks: CLIPVisionModelTaskPool = self.usual.taskpool
        method = self.usual.method
        if not method.makes_one_model:
            raise ConfigError(
                f"`protocol=robustness` scores a merged model, but `{method.method_name}` makes one model a task; "
                "choose another `method`"
            )
        split = getattr(method, "tta_split", "test")
        if protocol.source == "splits" and split != "test":
            raise ConfigError(
                f"`method.tta_split`={split} and `protocol.source`=splits do not go together: corrupted splits have no "
                "splits of their own; leave one of them out"
            )

    @property
    def runs(self) -> int:
        """How often it adapts and scores: once a condition."""
        return len(self.protocol.conditions)

    @cached_property
    def conditions(self) -> dict[str, FusionProgram]:
        """The run of each condition; models, heads and the processor are shared."""
        programs = {}
        built_once = BuiltOnce()
        for name in self.protocol.conditions:
            program = FusionProgram(self._config_of(name), self.output_dir / name, self.command)
            if not isinstance(program.taskpool, CLIPVisionModelTaskPool):
                raise ConfigError("`protocol=robustness` needs tasks to score on; choose another `taskpool`")
            program.taskpool = self._tasks.on_other_images(program.taskpool.specs)
            program.modelpool = self.usual.modelpool.on_other_images(program.modelpool.test_datasets)
            if isinstance(program.method, MoEMethod):
                program.method.builder = built_once
            programs[name] = program
        return programs

    def check(self) -> None:
        """See `FusionProgram.check`: of every condition.

        Raises:
            FusionMergeError: if pool, tasks, method or corrupted images do not fit.
        """
        self.usual.check()
        for program in self.conditions.values():
            program.check()

    def plan(self) -> str:
        """Return what the run is about to do, in words."""
        return f"{self.usual.plan()}\nprotocol   robustness: {', '.join(self.protocol.conditions)}\n{self._images()}"

    def run(self) -> Report:
        """Run every condition, and return the report of all of them that was written.

        Raises:
            FusionMergeError: if one fails; what was written of earlier ones stays.
        """
        start = time.perf_counter()
        self.check()
        fabric = make_fabric(**self.usual.fabric_options())
        with in_company():
            if fabric.is_global_zero:
                log.info("%s\n", self.plan())
                for file in ("report.json", "report.md"):
                    (self.output_dir / file).unlink(missing_ok=True)
            reports: dict[str, Report] = {}
            for name, program in self.conditions.items():
                if fabric.is_global_zero:
                    log.info("condition  %s (%d of %d)", name, len(reports) + 1, len(self.conditions))
                log_to(fabric, program.output_dir / "logs")
                reports[name] = program.run_on(fabric)
                program.forget_images()
            with together():
                return self._write(reports, time.perf_counter() - start, fabric)

    def _config_of(self, condition: str) -> dict[str, Any]:
        """Return the configuration of one condition: one that also gives the same scores as a run by itself."""
        config: dict[str, Any] = copy.deepcopy(dict(self.config))
        config["protocol"] = config["report_save_path"] = None
        config["output_dir"] = str(self.output_dir / condition)
        for part, table in (("taskpool", "tasks"), ("taskpool", "test_datasets"), ("modelpool", "test_datasets")):
            specs = config[part].get(table) or {}
            config[part][table] = {name: self._spec_of(condition, name, spec) for name, spec in specs.items()}
        if isinstance(folder := config.get("merged_model_save_path"), str):
            config["merged_model_save_path"] = str(Path(folder) / condition)
        if isinstance(file := config["method"].get("save_checkpoint"), str) and Path(file).name:
            path = Path(file)
            config["method"]["save_checkpoint"] = str(path.with_stem(f"{path.stem}-{condition}"))
        return config

    def _spec_of(self, condition: str, name: str, spec: Any) -> Any:
        chosen = self.protocol
        options = {"corruption": condition, "severity": chosen.severity, "corruption_constants": chosen.constants}
        corrupted = with_corruption(name, spec, **options)
        if condition == CLEAN:
            return spec
        return with_split(spec, condition) if chosen.source == "splits" else corrupted

    def _images(self) -> str:
        if self.protocol.source == "splits":
            return "Corrupted images are splits of the data."
        return f"Corrupted images are generated, of severity {self.protocol.severity} as in {self.protocol.constants}."

    def _write(self, reports: Mapping[str, Report], seconds: float, fabric: Fabric) -> Report:
        tasks = self._tasks.task_names
        described = next(iter(reports.values()))["run"]
        report: Report = {
            "averages": condition_averages(reports, tasks),
            "conditions": dict(reports),
            "run": {key: described[key] for key in ("method", "options", "models", "seed", "command", "versions")}
            | {"protocol": dict(self.config["protocol"]), "images": self._images(), "seconds": seconds},
        }
        if not fabric.is_global_zero:
            return report
        text = json.dumps(report, indent=2, default=str)
        write_text(self.output_dir / "report.json", text)
        if self.config.get("report_save_path"):
            write_text(self.config["report_save_path"], text)
        write_text(self.output_dir / "report.md", robustness_report(report, tasks))
        log.info("\naverage accuracy in percent\n%s", condition_table(report["averages"]))
        for remark in remarks(report):
            log.warning("%s", remark)
        log.info("\nreport in %s", self.output_dir / "report.md")
        return report
