"""What `fusion_merge analyse` computes and draws: one picture a name, its numbers as CSV and JSON beside it."""

from __future__ import annotations

import copy
import csv
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, final

from torch import nn
from tqdm.auto import tqdm

from fusion_merge.adaptation.runtime import Fabric, log_to, make_fabric, placement_of
from fusion_merge.errors import ConfigError
from fusion_merge.files import check_writable, write_text
from fusion_merge.models.merged import MergedCLIPVisionModel
from fusion_merge.models.parameters import bin_edges, explained_energy, magnitudes, variation, variation_rows
from fusion_merge.moe import Routing, set_routing
from fusion_merge.pools.model_pool import PRETRAINED, CLIPVisionModelPool
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool
from fusion_merge.processes import in_company
from fusion_merge.program import FusionProgram
from fusion_merge.protocols.measuring import measured
from fusion_merge.report import analysis_plots as plots
from fusion_merge.report.comparison import Row, accuracies_table, comparison_notes, costs_table, plain_rows
from fusion_merge.report.plots import loss_curve
from fusion_merge.report.provenance import routing_of, versions
from fusion_merge.report.routing import block_names, first_choices, mean_weights, routing_records

log = logging.getLogger(__name__)

Lines = list[dict[str, Any]]
"""A table: one line a row, by the columns' names."""


@dataclass(frozen=True)
class Swept:
    """An option that an analysis tries values of.

    Attributes:
        option: the method's option.
        values: what is tried, unless told otherwise.
        label: what the picture calls it.
        whole: whether values are whole numbers.
    """

    option: str
    values: tuple[float, ...]
    label: str
    whole: bool


SWEPT = {
    "sparsity": Swept("tv_prune_ratio", (0.5, 0.9, 0.99), "share of each task vector that is pruned", whole=False),
    "rank": Swept("rank_k", (1, 4, 16), "rank-one experts a task, rank_k", whole=True),
}

ANALYSES = {
    "first_choice": "share of each task's images whose largest coefficient is each task's expert",
    "loss": "the loss of each task over the adaptation steps",
    "magnitudes": "histogram of the magnitudes of task vectors; no images",
    "rank": "accuracy and explained energy over `rank_k`",
    "routing": "mean merging coefficients: task × expert, layer by layer",
    "sparsity": "accuracy over `tv_prune_ratio`, and over size",
    "variation": "how far MLP, attention and the rest of each layer moved in fine-tuning; no images",
}
"""What each analysis shows, by its name."""


@final
class Analysis:
    """One analysis.

    Args:
        name: one of `ANALYSES`.
        config: the resolved configuration, as in `config/config.yaml`.
        output_dir: where picture and numbers go.
        command: the command that started it.

    Raises:
        FusionMergeError: if the configuration does not hold together.
    """

    _of_parameters: ClassVar[tuple[str, ...]] = ("magnitudes", "variation")
    _of_a_routed_model: ClassVar[tuple[str, ...]] = ("first_choice", "routing")

    def __init__(self, name: str, config: Mapping[str, Any], output_dir: Path, command: str) -> None:
        self.name, self.output_dir, self.command = name, output_dir, command
        self.config: Mapping[str, Any] = {
            **config,
            **dict.fromkeys(("protocol", "report_save_path", "evaluate_routings", "unknown_task")),
            "baselines": [],
        }
        self.saved: str | None = config["analyse"]["model"]
        self.images: int = config["analyse"]["images"]
        self._refuse_options(config["analyse"]["values"])
        self.program = FusionProgram(self.config, output_dir, command)
        self._refuse_method()

    def _refuse_options(self, values: Sequence[float] | None) -> None:
        if self.images < 1:
            raise ConfigError(f"`analyse.images`={self.images} is below 1; choose at least 1")
        if values is not None and self.name not in SWEPT:
            raise ConfigError(f"`analyse.values`={values}: `{self.name}` tries no values; leave it out")
        if values is not None and not values:
            raise ConfigError("`analyse.values`=[] leaves nothing to try; give some, such as [0.5,0.9]")
        if self.saved is not None and self.name not in self._of_a_routed_model:
            raise ConfigError(f"`analyse.model`={self.saved!r}: `{self.name}` looks at no saved model; leave it out")
        swept = SWEPT.get(self.name)
        if swept and self.config["merged_model_save_path"]:
            raise ConfigError(
                f"`merged_model_save_path`={self.config['merged_model_save_path']!r}: `{self.name}` makes one model a "
                "value, and keeps none; leave it out"
            )
        self.values: list[float] = list(dict.fromkeys(values or (swept.values if swept else ())))
        for value in self.values:
            if swept and swept.whole and value != int(value):
                raise ConfigError(f"`analyse.values` has {value}: `{swept.option}` is a whole number")
        if swept and swept.whole:
            self.values = [int(value) for value in self.values]

    def _refuse_method(self) -> None:
        method, example = self.program.method, "choose `method=wemoe`, for example"
        if self.name in self._of_a_routed_model and self.saved is None and not method.routed:
            raise ConfigError(f"`{self.name}` looks at a routed model, which `{method.method_name}` is none; {example}")
        if self.name == "loss" and not (method.trains and method.makes_one_model):
            raise ConfigError(f"`loss` is that of an adaptation, and `{method.method_name}` adapts nothing; {example}")
        if self.name == "loss" and getattr(method, "checkpoint", False):
            raise ConfigError("`loss` is that of an adaptation; leave `method.checkpoint` out")
        swept = SWEPT.get(self.name)
        if swept and swept.option not in method.options():
            raise ConfigError(
                f"`{self.name}` tries values of `{swept.option}`, which `{method.method_name}` has not; "
                f"choose a method that has, as `fusion_merge analyse {self.name}` does by itself"
            )

    @property
    def needs_a_run(self) -> bool:
        """Whether a model is made for it."""
        return self.name not in self._of_parameters and self.saved is None

    @cached_property
    def runs(self) -> list[FusionProgram]:
        """The run of each value that is tried."""
        option, programs = SWEPT[self.name].option, []
        for value in self.values:
            config = copy.deepcopy(dict(self.config))
            folder = self.output_dir / f"{option}-{value:g}"
            config["method"][option], config["output_dir"] = value, str(folder)
            config["merged_model_save_path"] = None
            programs.append(FusionProgram(config, folder, self.command))
            programs[-1].share(self.program)
        return programs

    @property
    def _tasks(self) -> CLIPVisionModelTaskPool:
        pool = self.program.taskpool
        if not isinstance(pool, CLIPVisionModelTaskPool):
            raise ConfigError(f"`{self.name}` needs images of tasks; choose another `taskpool`")
        return pool

    @property
    def _models(self) -> CLIPVisionModelPool:
        return self.program.modelpool

    def check(self) -> None:
        """Check what can be checked before any weight is read.

        Raises:
            FusionMergeError: if pools, tasks, method or values do not fit.
        """
        check_writable(self.output_dir, "output_dir", kind="folder")
        if find_spec("matplotlib") is None:
            raise ConfigError("`analyse` draws, which needs matplotlib: pip install 'fusion_merge[plot]'")
        if self.name in self._of_parameters:
            self._models.check(1)
        elif self.saved is not None:
            self._tasks.check()
        else:
            if self.name != "loss":
                self._tasks.check()
            for program in self.runs if self.name in SWEPT else [self.program]:
                program.check()

    def plan(self) -> str:
        """Return what is about to be done, in words."""
        values = f" for {', '.join(f'{value:g}' for value in self.values)}" if self.values else ""
        first = f"analysis   {self.name}{values}: {ANALYSES[self.name]}"
        return "\n".join([first, self.program.plan()])

    def run(self) -> Path:
        """Compute and draw it, and return the picture's file.

        Raises:
            FusionMergeError: if something does not fit.
        """
        self.check()
        fabric = make_fabric(**self.config["fabric"])
        with in_company():
            if self.name == "variation":
                return self._variation(fabric)
            if self.name == "magnitudes":
                return self._magnitudes(fabric)
            if self.name == "loss":
                return self._loss(fabric)
            return self._sweep(fabric) if self.name in SWEPT else self._routing(fabric)

    def _make(self, fabric: Fabric) -> nn.Module:
        log_to(fabric, self.output_dir / "logs")
        model = self.program.make(fabric)
        self.program.method.on_run_end()
        if not isinstance(model, nn.Module):
            raise ConfigError(f"`{self.name}` looks at one model, and `{self.program.method.method_name}` made several")
        return model

    def _routed(self, fabric: Fabric) -> MergedCLIPVisionModel:
        if self.saved is None:
            made = self._make(fabric)
            if isinstance(made, MergedCLIPVisionModel) and made.config.moe:
                return made
            raise ConfigError(f"`{self.program.method.method_name}` made no model with routed layers")
        model = MergedCLIPVisionModel.from_pretrained(self.saved)
        if not model.config.moe:
            raise ConfigError(f"`analyse.model`={self.saved!r} has no routed layers; give the folder of a routed model")
        fabric.to_device(model)
        return model

    def _routing(self, fabric: Fabric) -> Path:
        model = self._routed(fabric)
        own = routing_of(model)
        if self.name == "first_choice":
            set_routing(model, Routing.SAMPLE)  # each image has a choice of its own
        records = routing_records(model, self._tasks, placement=placement_of(fabric), images=self.images)
        experts = model.config.tasks
        found = (first_choices if self.name == "first_choice" else mean_weights)(records, len(experts))
        value = "share" if self.name == "first_choice" else "coefficient"
        lines: Lines = [
            {"task": task, "layer": layer, "expert": expert, value: float(number)}
            for task, matrix in found.items()
            for layer, row in enumerate(matrix)
            for expert, number in zip(experts, row, strict=True)
        ]
        about: dict[str, Any] = {"images": self.images, "routing": "sample" if self.name == "first_choice" else own}
        about |= {"method": model.config.method, "options": model.config.method_options}
        layers = partial(plots.layers_picture, blocks=block_names(model))
        draw = plots.first_choice_picture if self.name == "first_choice" else layers
        picture = self._picture(fabric)
        if fabric.is_global_zero:
            draw(picture, found, experts, title=model.config.method)
            if self.name == "first_choice":
                right = {t: float(found[t][:, experts.index(t)].mean()) for t in found if t in experts}
                log.info("own expert first: %s", ", ".join(f"{t} {100 * s:.0f} %" for t, s in right.items()))
        return self._write(lines, about, fabric)

    def _variation(self, fabric: Fabric) -> Path:
        pretrained = self._models.state(PRETRAINED)
        found = {
            name: variation(pretrained, self._models.state(name))
            for name in tqdm(self._models.model_names, desc="comparing parameters", unit="model", disable=None)
        }
        if fabric.is_global_zero:
            plots.variation_picture(self._picture(fabric), found)
        return self._write(variation_rows(found), {}, fabric)

    def _magnitudes(self, fabric: Fabric) -> Path:
        pretrained = self._models.state(PRETRAINED)
        found = {
            name: magnitudes(pretrained, self._models.state(name))
            for name in tqdm(self._models.model_names, desc="counting magnitudes", unit="model", disable=None)
        }
        edges = bin_edges()
        lines: Lines = [{"task": t, "from": 0.0, "to": 0.0, "entries": m.zeros} for t, m in found.items()]
        lines += [
            {"task": task, "from": edges[i], "to": edges[i + 1], "entries": count}
            for task, m in found.items()
            for i, count in enumerate(m.counts)
            if count
        ]
        shares = (0.5, 0.9, 0.99)
        about = {"below": {t: {str(share): m.quantile(share) for share in shares} for t, m in found.items()}}
        if fabric.is_global_zero:
            plots.magnitudes_picture(self._picture(fabric), found)
        return self._write(lines, about, fabric)

    def _loss(self, fabric: Fabric) -> Path:
        self._make(fabric)
        record = getattr(self.program.method, "record", None)
        if record is None or not record.losses:
            raise ConfigError(f"`{self.program.method.method_name}` adapted nothing; choose more `method.max_steps`")
        steps = zip(*record.losses.values(), strict=True)
        first = record.resumed_at + 1
        lines: Lines = [
            {"step": first + i, **dict(zip(record.losses, values, strict=True))} for i, values in enumerate(steps)
        ]
        about = {
            "unit": "nats" if record.measure == "entropy" else record.measure,
            "steps": record.steps,
            "collapsed": record.collapsed,
            **self._about_method(),
        }
        if fabric.is_global_zero:
            loss_curve(self._picture(fabric), record.losses, record.measure, taken_back=record.taken_back)
        return self._write(lines, about, fabric)

    def _sweep(self, fabric: Fabric) -> Path:
        tasks, swept = self._tasks.task_names, SWEPT[self.name]
        rows: list[Row] = []
        for value, program in zip(self.values, self.runs, strict=True):
            rows.append(measured(program, f"{swept.option}={value:g}", fabric)[0])
            record = getattr(program.method, "record", None)
            if record is not None and record.interrupted:
                log.warning("interrupted: %d of %d values", len(rows), len(self.values))
                break
        values = self.values[: len(rows)]
        energies = self._energies(values) if self.name == "rank" else None
        lines: Lines = []
        for index, (value, row) in enumerate(zip(values, rows, strict=True)):
            scores = {"average": row.average(tasks), **row.accuracies}
            line = {swept.option: value, **scores, "stored": row.stored, "megabytes": row.megabytes}
            lines.append(line | ({"explained_energy": energies[index]} if energies is not None else {}))
        if fabric.is_global_zero:
            path = self._picture(fabric)
            plots.sweep_picture(path, values, rows, tasks, label=swept.label, energies=energies)
            log.info("\naccuracy in percent\n%s\n\n%s", accuracies_table(rows, tasks), costs_table(rows, tasks))
            for note in comparison_notes(rows):
                log.warning("%s", note)
        return self._write(lines, {"rows": plain_rows(rows, tasks), **self._about_method()}, fabric)

    def _energies(self, values: Sequence[float]) -> list[float]:
        """Return the explained energy of each rank, the mean over tasks."""
        pretrained = self._models.state(PRETRAINED)
        ranks = [int(value) for value in values]
        names = tqdm(self._models.model_names, desc="explained energy", unit="model", disable=None)
        found = [explained_energy(pretrained, self._models.state(name), ranks) for name in names]
        return [sum(values) / len(values) for values in zip(*found, strict=True)]

    def _about_method(self) -> dict[str, Any]:
        return {"method": self.program.method.method_name, "options": self.program.method.options()}

    def _picture(self, fabric: Fabric) -> Path:
        return self.output_dir / f"{self.name}.png"

    def _write(self, lines: Lines, about: Mapping[str, Any], fabric: Fabric) -> Path:
        """Write the numbers beside the picture."""
        picture = self._picture(fabric)
        if not fabric.is_global_zero:
            return picture
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
        write_text(picture.with_suffix(".csv"), file.getvalue())
        described = {
            "analysis": self.name,
            "command": self.command,
            "seed": self.config["seed"],
            "models": {name: self._models.describe(name) for name in self._models.all_model_names},
            "versions": versions(),
            **about,
            "values": lines,
        }
        write_text(picture.with_suffix(".json"), json.dumps(described, indent=2, default=str))
        log.info("\npicture in %s, numbers in %s and .json", picture, picture.with_suffix(".csv"))
        return picture
