"""The program: pool → method → save → evaluate → report."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning_fabric import Fabric
from torch import nn

from fusion_merge.adaptation.runtime import check_precision, make_fabric, placement_of
from fusion_merge.errors import ConfigError, DataError, nearest
from fusion_merge.files import check_writable, write_text
from fusion_merge.methods.base import Method
from fusion_merge.methods.task_arithmetic import TaskArithmeticAlgorithm
from fusion_merge.models.clip import save_tower
from fusion_merge.models.merged import MergedCLIPVisionModel
from fusion_merge.models.task_models import TaskModels
from fusion_merge.moe import Routing, set_routing
from fusion_merge.pools.model_pool import CLIPVisionModelPool
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool, TaskPool
from fusion_merge.processes import in_company, together
from fusion_merge.registry import object_from_config
from fusion_merge.report.plots import loss_curve, routing_picture
from fusion_merge.report.provenance import provenance, routing_of, scoring_of, versions
from fusion_merge.report.routing import block_names, routing_weights
from fusion_merge.report.tables import accuracy_table, average, columns_of, model_size, written_report
from fusion_merge.report.unknown_task import check_unknown_task, give_heads, unknown_task_scores

log = logging.getLogger(__name__)

Report = dict[str, Any]

_WRITTEN = ("report.json", "report.md", "reproduction.json", "reproduction.md", "routing.png", "loss.png")


def task_pool_config(config: Mapping[str, Any], modelpool: CLIPVisionModelPool) -> Mapping[str, Any]:
    """Return the task pool's configuration: one that is given no tasks takes the model pool's `test_datasets`.

    Args:
        config: the resolved configuration, as in `config/config.yaml`.
        modelpool: the models.

    Raises:
        DataError: if there are no tasks in either.
    """
    own: Mapping[str, Any] = config["taskpool"]
    tables = [own[key] for key in ("tasks", "test_datasets") if key in own]
    if not tables or any(tables):
        return own
    if not modelpool.test_datasets:
        raise DataError(
            "there is nothing to score on: the task pool has no tasks, and the model pool no `test_datasets`; "
            "choose `taskpool=NAME`, give `taskpool.tasks.TASK={data: …}`, or take `taskpool=dummy`"
        )
    return {**own, "test_datasets": modelpool.test_datasets}


class FusionProgram:
    """One run, from a plain configuration.

    Args:
        config: the resolved configuration, as in `config/config.yaml`.
        output_dir: where reports, pictures and logs go; made when the first is written.
        command: the command that started the run, for the report.

    Raises:
        FusionMergeError: if the configuration does not hold together; nothing was written then.
    """

    def __init__(self, config: Mapping[str, Any], output_dir: Path, command: str = "") -> None:
        self.command = command
        self.config = config
        self.output_dir = output_dir
        self.method: Method = object_from_config(config["method"], "method", Method)
        self.modelpool: CLIPVisionModelPool = object_from_config(config["modelpool"], "modelpool", CLIPVisionModelPool)
        self.taskpool: TaskPool = object_from_config(task_pool_config(config, self.modelpool), "taskpool", TaskPool)
        self.seconds: dict[str, float] = {}
        self.groups: dict[str, list[str]] = {}
        """Tasks whose averages are reported by themselves, by what they are called."""
        self.is_global_zero = True
        """Whether this process is the one, of several, that writes and speaks."""
        if isinstance(self.taskpool, CLIPVisionModelTaskPool):
            self.modelpool.lend_pretrained(self.taskpool)

    @property
    def usual(self) -> FusionProgram:
        """The run itself; a protocol's program may consist of several."""
        return self

    @property
    def runs(self) -> int:
        """How often it adapts and scores."""
        return 1

    def check(self) -> None:
        """Check what can be checked before any weight is read.

        Raises:
            FusionMergeError: if pool, tasks and method do not fit.
        """
        self.method.check(self.modelpool, self._tasks_for_method())
        if isinstance(self.taskpool, CLIPVisionModelTaskPool):
            self.taskpool.check()
        self.check_routings()
        check_unknown_task(self.config, self.method, self.taskpool)
        self.check_surroundings()

    def check_surroundings(self) -> tuple[torch.device, int]:
        """Check the places that are written to and what the machine has; return the device, and how many processes.

        Raises:
            FusionMergeError: if something cannot be written, or the machine has not what was asked for.
        """
        self._check_places()
        fabric = make_fabric(**self.fabric_options(), launch=False)
        if self.method.trains:
            check_precision(fabric)
        return fabric.device, fabric.world_size

    def check_routings(self) -> None:
        """Check under which further routings the model is to be scored.

        Raises:
            ConfigError: if one is unknown, or the model has none.
        """
        wanted, known = self.config.get("evaluate_routings") or [], [routing.value for routing in Routing]
        for name in wanted:
            if name not in known:
                raise ConfigError(f"`evaluate_routings` has {name!r}, which is not a routing; {nearest(name, known)}")
        if wanted and not self.method.routed:
            raise ConfigError(
                f"`evaluate_routings`={wanted}: `{self.method.method_name}` makes no routed model; leave it out"
            )
        if wanted and not isinstance(self.taskpool, CLIPVisionModelTaskPool):
            raise ConfigError(f"`evaluate_routings`={wanted}: this task pool scores nothing; leave it out")

    def _check_places(self) -> None:
        check_writable(self.output_dir, "output_dir", kind="folder")
        if self.config.get("report_save_path"):
            check_writable(self.config["report_save_path"], "report_save_path")
        folder = self.config.get("merged_model_save_path")
        if folder and not self.method.makes_one_model:
            raise ConfigError(
                f"`merged_model_save_path`={folder!r}: `{self.method.method_name}` makes one model a task, "
                "not a merged one; its own `output` says where they go"
            )
        if folder and not self.method.makes_tower:
            raise ConfigError(
                f"`merged_model_save_path`={folder!r}: `{self.method.method_name}` makes no vision tower that could be "
                "saved as one; leave it out"
            )
        if folder:
            check_writable(folder, "merged_model_save_path", kind="folder")

    def plan(self) -> str:
        """Return what the run is about to do, in words."""
        names = self.modelpool.model_names
        lines = [
            f"method     {self.method.method_name}",
            f"base       {self.modelpool.base_model}",
            f"models     {len(names)}: {', '.join(names) or 'none but the base'}",
        ]
        if isinstance(self.taskpool, CLIPVisionModelTaskPool):
            sizes = [f"{n} ({len(self.taskpool.task(n))})" for n in self.taskpool.task_names]
            lines.append(f"tasks      {', '.join(sizes)} images")
        lines.append(f"output     {self.output_dir}")
        return "\n".join(lines)

    def run(self) -> Report:
        """Run everything, and return the report that was written."""
        with self._phase("reading"):
            self.check()
        fabric = make_fabric(**self.fabric_options(), log_dir=self.output_dir / "logs")
        self.is_global_zero = fabric.is_global_zero
        with in_company():
            return self.run_on(fabric)

    def run_on(self, fabric: Fabric) -> Report:
        """Run everything but the checks, and return the report that was written.

        Args:
            fabric: where to compute; its processes run, and its loggers are this run's.
        """
        return self.report_on(self.make(fabric), fabric)

    def make(self, fabric: Fabric) -> nn.Module | TaskModels:
        """Make the model, save it if a place for it is named, and return it; nothing is scored yet.

        Args:
            fabric: as in `run_on`.
        """
        self.is_global_zero = fabric.is_global_zero
        with together():
            if fabric.is_global_zero:
                log.info("%s\n", self.plan())
                self._clear()
                write_text(self.output_dir / "config.yaml", yaml.safe_dump(dict(self.config), sort_keys=False))
        with self._phase("method"):
            model = self.method.run(self.modelpool, self._tasks_for_method(), fabric)
        with together():
            give_heads(model, self.taskpool)
            self._save(model, fabric)
        return model

    def report_on(self, model: nn.Module | TaskModels, fabric: Fabric) -> Report:
        """Score a model that `make` returned and what it is shown beside, and return the report that was written.

        Args:
            model: the model.
            fabric: as in `run_on`.
        """
        with self._phase("evaluation"):
            report = self._evaluate(model, fabric)
            if routings := self._evaluate_routings(model, fabric):
                report["routings"] = routings
            if found := unknown_task_scores(model, self.taskpool, self.config, placement_of(fabric)):
                report["unknown_task"] = found
        with self._phase("baselines"):
            report["baselines"] = self._baselines(fabric)
        further = (*report["baselines"].values(), *report.get("routings", {}).values())
        for column in (report, *further) if self.groups else ():
            column["averages"] = {name: average(column, tasks) for name, tasks in self.groups.items()}
        report["run"] = self._describe_run(model, fabric)
        with together():
            self._describe_model(model, report, fabric)
            if fabric.is_global_zero:
                self._write(report, model, fabric)
                self.method.on_run_end()
        return report

    def share(self, other: FusionProgram) -> None:
        """Take models and tasks from another run, so that weights, images and heads are read once for both.

        Args:
            other: a run whose configuration has the same model pool and task pool.
        """
        self.modelpool, self.taskpool = other.modelpool, other.taskpool

    def forget_images(self) -> None:
        """Let go of the images that are kept in memory; they are read again where they are needed."""
        pools = [self.taskpool] if isinstance(self.taskpool, CLIPVisionModelTaskPool) else []
        for pool in (*pools, *self.modelpool.made_task_pools()):
            pool.forget_images()

    def fabric_options(self) -> dict[str, Any]:
        """Return the options of Fabric: `method.devices`, fusion_bench's name, counts devices other than the CPU."""
        options = dict(self.config["fabric"])
        devices = getattr(self.method, "devices", 1)
        if devices in (1, options["devices"]):
            return options
        if options["devices"] != 1:
            raise ConfigError(
                f"`method.devices`={devices!r} and `fabric.devices`={options['devices']!r} disagree; give one of them"
            )
        if make_fabric(**options, launch=False).device.type == "cpu":
            log.info("`method.devices`=%s has no effect on the CPU; `fabric.devices` starts several processes", devices)
            return options
        return options | {"devices": devices}

    def _clear(self) -> None:
        """Remove what an earlier run left in the same folder, so that nothing old stands beside the new report."""
        for name in (*_WRITTEN, "logs/metrics.csv"):
            (self.output_dir / name).unlink(missing_ok=True)

    def _tasks_for_method(self) -> CLIPVisionModelTaskPool | None:
        return self.taskpool if isinstance(self.taskpool, CLIPVisionModelTaskPool) else None

    def _save(self, model: nn.Module | TaskModels, fabric: Fabric) -> None:
        folder = self.config.get("merged_model_save_path")
        if not folder or not fabric.is_global_zero:
            return
        if isinstance(model, MergedCLIPVisionModel):
            model.save_pretrained(folder)
        elif isinstance(model, nn.Module):
            save_tower(model, Path(folder).expanduser())
        log.info("merged model saved to %s", folder)

    def _describe_model(self, model: nn.Module | TaskModels, report: Report, fabric: Fabric) -> None:
        """Say in the saved model's card what it scores; it was saved before, so that no failure here loses it."""
        folder = self.config.get("merged_model_save_path")
        if folder and fabric.is_global_zero and isinstance(model, MergedCLIPVisionModel):
            tasks = [t for t in getattr(self.taskpool, "task_names", []) if t in report]
            model.add_scores(folder, {t: report[t]["accuracy"] for t in tasks}, report["run"]["command"])

    def _evaluate(self, model: nn.Module | TaskModels, fabric: Fabric) -> Report:
        if not isinstance(self.taskpool, CLIPVisionModelTaskPool):
            return self.taskpool.evaluate(model)
        tasks = [t for t in self.taskpool.task_names if not isinstance(model, TaskModels) or t in model]
        label = f"scoring {self.method.method_name}"
        return self.taskpool.evaluate(model, placement=placement_of(fabric), tasks=tasks, label=label)

    def _evaluate_routings(self, model: nn.Module | TaskModels, fabric: Fabric) -> dict[str, Report]:
        """Score a routed model under the further routings that were asked for, and leave it with its own."""
        own = routing_of(model)
        wanted = [name for name in dict.fromkeys(self.config.get("evaluate_routings") or []) if name != own]
        if not wanted:
            return {}
        if own is None or not isinstance(model, MergedCLIPVisionModel):
            raise ConfigError(f"`evaluate_routings`: `{self.method.method_name}` made no model of one routing")
        scores: dict[str, Report] = {}
        placement = placement_of(fabric)
        try:
            for name in wanted:
                set_routing(model, name)
                scores[name] = self.taskpool.evaluate(model, placement=placement, label=f"scoring with {name} routing")
                scores[name].pop("model_info")
                scores[name]["evaluation"] = scoring_of(model, self.taskpool, fabric.world_size)
        finally:
            set_routing(model, own)
        return scores

    def _baselines(self, fabric: Fabric) -> dict[str, Report]:
        if not isinstance(self.taskpool, CLIPVisionModelTaskPool):
            return {}
        names = self.modelpool.model_names
        wanted = [b for b in self.config["baselines"] if b != self.method.method_name]
        scores: dict[str, Report] = {}
        for name in wanted:
            tasks = self.taskpool.task_names
            model: nn.Module | TaskModels
            if name != "zero_shot" and len(names) < 2:
                continue
            with together():
                if name == "zero_shot":
                    model = self.modelpool.load_pretrained_model()
                elif name == "task_arithmetic":
                    model = TaskArithmeticAlgorithm().run(self.modelpool)  # with its published λ, 0.3
                else:
                    model, tasks = self.modelpool.fine_tuned_models(), [t for t in tasks if t in names]
            placement = placement_of(fabric)
            scores[name] = self.taskpool.evaluate(model, placement=placement, tasks=tasks, label=f"scoring {name}")
        return scores

    def _describe_run(self, model: nn.Module | TaskModels, fabric: Fabric) -> Report:
        record = getattr(self.method, "record", None)
        return {
            "method": self.method.method_name,
            "options": self.method.options(),
            "models": {name: self.modelpool.describe(name) for name in self.modelpool.all_model_names},
            "seed": self.config["seed"],
            "command": self.command,
            "adaptation": record and record.told(),
            "seconds": self.seconds,
            "versions": versions(),
            "evaluation": scoring_of(model, self.taskpool, fabric.world_size),
            "provenance": provenance(self.modelpool, self.taskpool, getattr(self.method, "adapted_on", {})),
        }

    def _write(self, report: Report, model: nn.Module | TaskModels, fabric: Fabric) -> None:
        tasks = [t for t in getattr(self.taskpool, "task_names", []) if t in report]
        columns = columns_of(report)
        pictures = self._pictures(report, model, fabric)
        table = accuracy_table(columns, tasks, style="github", groups=self.groups) if tasks else ""
        text = json.dumps(report, indent=2, default=str)
        write_text(self.output_dir / "report.json", text)
        if self.config.get("report_save_path"):
            write_text(self.config["report_save_path"], text)
        write_text(self.output_dir / "report.md", written_report(report, table, pictures))
        if tasks:
            log.info("\naccuracy in percent\n%s", accuracy_table(columns, tasks, groups=self.groups))
        if "model_info" in report:
            log.info("\n%s", model_size(report["model_info"]))
        log.info("\nreport in %s", self.output_dir / "report.md")

    def _pictures(self, report: Report, model: nn.Module | TaskModels, fabric: Fabric) -> list[str]:
        pictures = []
        record = getattr(self.method, "record", None)
        plot = find_spec("matplotlib") is not None
        if not plot:
            log.info("no pictures without matplotlib: pip install 'fusion_merge[plot]'")
        routed = model if isinstance(model, MergedCLIPVisionModel) and model.config.moe else None
        if routed is not None and isinstance(self.taskpool, CLIPVisionModelTaskPool):
            weights = routing_weights(routed, self.taskpool, placement=placement_of(fabric))
            report["run"]["routing"] = {name: w.tolist() for name, w in weights.items()}
            if plot:
                steps = f" after {record.steps} steps" if record is not None else ""
                how: dict[str, Any] = {"blocks": block_names(routed), "title": f"{self.method.method_name}{steps}"}
                routing_picture(self.output_dir / "routing.png", weights, routed.config.tasks, **how)
                pictures.append("routing.png")
        if plot and record is not None and record.steps > 1:
            loss_curve(self.output_dir / "loss.png", record.losses, record.measure, taken_back=record.taken_back)
            pictures.append("loss.png")
        return pictures

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
