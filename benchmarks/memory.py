"""Memory of building whole models, of one pass of a layer, and of expert banks, each in a process of its own."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from benchmarks.layers import fine_tune
from benchmarks.models import make_tower
from benchmarks.phases import activation, apart, build
from benchmarks.report import REFERENCE_TO_OURS, Row, Target, sized_row
from benchmarks.settings import BATCH, GEOMETRIES, METHODS, Geometry, Settings
from fusion_merge import get_method
from fusion_merge.models.clip import vision_backbone
from fusion_merge.moe import find_mlps

_SPARE = 200e6  # bytes that building may take besides the model and one expert's tower
_ACTIVATION = 8.0
_BANK = {"float32": 0.26, "float16": 0.16}  # GB


def write_models(folder: Path, geometry: Geometry, tasks: int) -> int:
    """Write a random tower and fine-tuned ones, one at a time; return the bytes of one.

    Args:
        folder: where they go, one folder each.
        geometry: the shape.
        tasks: how many are fine-tuned.
    """
    logging.disable_progress_bar()
    base = make_tower(geometry)
    base.save_pretrained(folder / "pretrained")
    for task in range(tasks):
        tuned = copy.deepcopy(base)
        for mlp in find_mlps(vision_backbone(tuned)).values():
            fine_tune(mlp.fc1, geometry.rank)
            fine_tune(mlp.fc2, geometry.rank)
        for name, parameter in tuned.named_parameters():
            if ".mlp." not in name:
                parameter.data += 1e-4 * torch.randn_like(parameter)
        tuned.save_pretrained(folder / f"task-{task}")
    return sum(p.nbytes for p in base.parameters())


def memory_rows(settings: Settings) -> Iterator[Row]:
    """Measure all that is about memory.

    Args:
        settings: of the run.
    """
    yield activation_row(settings)
    settings.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.output, prefix=".models-") as folder:
        models, toys = Path(folder) / "models", Path(folder) / "toys"
        tower = write_models(models, settings.geometry, settings.tasks)
        write_models(toys, GEOMETRIES["toy"], 2)
        for method in METHODS:
            save = Path(folder) / "saved" if method == "e_wemoe" else None
            found = apart(build, settings, method, models, toys, save)
            yield build_row(method, found, tower, settings)
        yield from bank_rows("float32", found, settings)
        if _has_dtype():
            found = apart(build, settings, "e_wemoe", models, toys, Path(folder) / "half", "float16")
            yield from bank_rows("float16", found, settings)


def _has_dtype() -> bool:
    """Tell whether banks can be stored in half precision."""
    return "expert_dtype" in {field.name for field in dataclasses.fields(get_method("e_wemoe"))}


def activation_row(settings: Settings) -> Row:
    """Measure a forward and backward pass of WEMoE's MLP, sample routing.

    Args:
        settings: of the run.
    """
    sizes = {who: apart(activation, settings, "wemoe", who) for who in ("floor", "ours", "reference")}
    note = f"Activations: one MLP of {settings.geometry}, {settings.tasks} experts, batch {BATCH}. The peak of what "
    note += "PyTorch allocates between the beginning of the forward and the end of the backward pass, gradients "
    note += "included and weights not, as its profiler records every allocation. The floor is a plain MLP."
    title = "WEMoE, one MLP, sample routing, forward + backward: activations"
    target = Target(REFERENCE_TO_OURS, _ACTIVATION, at_least=True)
    return sized_row("memory", title, "MB", sizes, target=target, note=note)


def build_row(method: str, found: dict[str, Any], tower: int, settings: Settings) -> Row:
    """Make the row of a model's building.

    Args:
        method: one of `METHODS`.
        found: what the phase measured.
        tower: the bytes of one tower.
        settings: of the run.
    """
    limit = (found["model"] + tower + _SPARE) / 1e9
    note = f"Building: {settings.geometry}, {settings.tasks} experts, from safetensors on disk. The peak of resident "
    note += "memory above that right before, after imports and the building of a toy; pages of mapped files count. "
    note += "The floor is the finished model; the target allows one tower "
    note += f"({tower / 1e6:,.0f} MB) and {_SPARE / 1e6:.0f} MB besides."
    if not found["fresh"]:
        note += " Here earlier peaks could not be forgotten; the figures may be too high."
    title = f"{METHODS[method]}, whole model: peak while building"
    target = Target("ours", limit) if method != "e_wemoe" else None
    sizes = {"ours": found["peak"], "floor": found["model"]}
    mapped = f"{METHODS[method]}: when it is built, {found['mapped'] / 1e6:,.0f} MB more of mapped files are resident."
    return sized_row("memory", title, "GB", sizes, target=target, note=f"{note}\n\n{mapped}")


def bank_rows(dtype: str, found: dict[str, Any], settings: Settings) -> Iterator[Row]:
    """Make the rows of E-WEMoE's banks, in memory and on disk.

    Args:
        dtype: in which the values are stored.
        found: what the phase measured.
        settings: of the run.
    """
    width, hidden = settings.geometry.width, settings.geometry.hidden
    dense = 4 * settings.tasks * settings.geometry.layers * (2 * width * hidden + width + hidden)
    note = "Banks: all tensors of the experts. The reference is a dense bank in float32, by arithmetic: fusion-bench "
    note += "stores the zeros. GB are 10⁹ bytes."
    if dtype == "float32" and not _has_dtype():
        note += " Banks in half precision are not measured: the method has no `expert_dtype`."
    for place, key in (("in memory", "banks"), ("on disk", "banks_on_disk")):
        title = f"E-WEMoE 90 %, expert banks of the whole model, {dtype}, {place}"
        sizes = {"ours": found[key], "reference": dense}
        yield sized_row("memory", title, "GB", sizes, target=Target("ours", _BANK[dtype]), note=note)
