"""Checkpoints of what was adapted, such as routers, alone, and what they belong to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusion_merge.errors import CheckpointError
from fusion_merge.models.merged import MergedCLIPVisionModel
from fusion_merge.moe import moe_layers
from fusion_merge.sealed import checksum, read_about, read_sealed, read_shapes, write_sealed

FORMAT = 1
_MEASURED = "task_coefficients"
_INPUTS = "task_inputs"


def router_state(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of all routers by layer; a shared router's stand under its first layer.

    Args:
        model: a model with routed MLPs.
    """
    routers = nn.ModuleDict({name.replace(".", "/"): layer.router for name, layer in moe_layers(model).items()})
    return {name.replace("/", "."): parameter for name, parameter in routers.named_parameters()}


def save_trained(path: Path | str, state: Mapping[str, Tensor], belongs_to: Mapping[str, Any]) -> None:
    """Write what was adapted, whole or not at all.

    Args:
        path: where; any ending will do, the content is safetensors.
        state: the parameters by name.
        belongs_to: what they fit, as plain values: method, options, tasks, fingerprints.

    Raises:
        FusionMergeError: if the file cannot be written.
    """
    write_sealed(path, dict(state), {"version": FORMAT, **belongs_to})


def check_trained(path: Path | str, belongs_to: Mapping[str, Any], part: str = "routers") -> None:
    """Refuse a checkpoint that does not fit, from its header alone.

    Args:
        path: what `save_trained` wrote.
        belongs_to: what its parameters must fit.
        part: what they are, for errors.

    Raises:
        CheckpointError: if the file cannot be read or does not fit; the message says what differs.
    """
    about = read_about(path, called(part))
    about.pop(_MEASURED, None)
    check_belongs(path, called(part), about, {"version": FORMAT, **belongs_to})


def load_trained(
    path: Path | str, own: Mapping[str, nn.Parameter], belongs_to: Mapping[str, Any], part: str = "routers"
) -> None:
    """Read what was adapted into the parameters of a model.

    Args:
        path: what `save_trained` wrote.
        own: the parameters by name; changed.
        belongs_to: what they must fit.
        part: what they are, for errors.

    Raises:
        CheckpointError: if the file cannot be read or does not fit; the message says what differs.
    """
    what = called(part)
    tensors, about = read_sealed(path, what)
    for name in (_MEASURED, _INPUTS):
        tensors.pop(name, None)
    about.pop(_MEASURED, None)
    check_belongs(path, what, about, {"version": FORMAT, **belongs_to})
    there, here = ({n: list(t.shape) for n, t in state.items()} for state in (tensors, own))
    if differences := _differences(there, here):
        raise CheckpointError(f"{what} `{path}` does not fit: shape of " + "; ".join(differences[:3]))
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise CheckpointError(f"{what} `{path}` holds something else than finite numbers in `{name}`; use another")
    for name, parameter in own.items():
        parameter.data.copy_(tensors[name])


def called(part: str) -> str:
    """Return what a checkpoint of something is called.

    Args:
        part: what it holds, in the plural.
    """
    return f"{part.removesuffix('s')} checkpoint"


def add_coefficients(path: Path | str, model: MergedCLIPVisionModel) -> None:
    """Add the mean merging coefficients of each task, and what routers read of its images, to a router checkpoint.

    Args:
        path: what `save_trained` wrote.
        model: the model whose routers they are, in their final form.

    Raises:
        FusionMergeError: if the file cannot be read or written.
    """
    tensors, about = read_sealed(path, called("routers"))
    tensors[_MEASURED] = model.task_coefficients
    if model.task_inputs is not None:
        tensors[_INPUTS] = model.task_inputs
    about[_MEASURED] = {"tasks": model.config.measured_tasks, "routers": checksum(router_state(model))}
    write_sealed(path, tensors, about)


def load_coefficients(path: Path | str, model: MergedCLIPVisionModel) -> None:
    """Read into a model what `add_coefficients` wrote, if it is of the model's very routers.

    Args:
        path: what `save_trained` wrote.
        model: a model with the routers of that file, in their final form; changed.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    tensors, about = read_sealed(path, called("routers"))
    measured = about.get(_MEASURED, {})
    if measured.get("routers") == checksum(router_state(model)):
        model.task_coefficients.copy_(tensors[_MEASURED])
        model.config.measured_tasks = list(measured["tasks"])
        if _INPUTS in tensors:
            model.task_inputs = tensors[_INPUTS].to(model.task_coefficients)


def images_read(path: Path | str) -> int:
    """Return of how many images a task a router checkpoint holds what routers read of them, from its header alone.

    Args:
        path: what `save_trained` wrote.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    shape = read_shapes(path, called("routers")).get(_INPUTS, ())  # (N, L, M, F + 1)
    return shape[2] if len(shape) == 4 else 0


def check_belongs(path: Path | str, what: str, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a file that belongs to something else.

    Args:
        path: the file.
        what: how errors call it.
        stored: what it belongs to.
        expected: what it should belong to.

    Raises:
        CheckpointError: if the two are not the same; the message says what differs.
    """
    plain = json.loads(json.dumps(expected))
    for telling in ("method", "tasks"):  # with another method or other tasks, all else differs too
        if isinstance(stored, Mapping) and telling in plain and stored.get(telling) != plain[telling]:
            plain, stored = {telling: plain[telling]}, {telling: stored.get(telling)}
    if differences := _differences(stored, plain):
        raise CheckpointError(f"{what} `{path}` does not fit: " + "; ".join(differences))


def _differences(stored: Any, expected: Any, path: str = "") -> list[str]:
    if isinstance(stored, dict) and isinstance(expected, dict):
        keys = sorted(stored.keys() | expected.keys())
        return [
            line
            for key in keys
            for line in _differences(stored.get(key), expected.get(key), f"{path}.{key}".lstrip("."))
        ]
    if stored == expected:
        return []
    return [f"`{path}` is {stored!r} there and {expected!r} here"]
