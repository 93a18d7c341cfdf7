"""What it takes to repeat a run: versions, machine, and where models and data came from."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from fusion_merge.models.merged import MergedCLIPVisionModel
from fusion_merge.moe import moe_layers
from fusion_merge.pools.model_pool import CLIPVisionModelPool
from fusion_merge.pools.revisions import data_origin, model_origins
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool, TaskPool

_PACKAGES = ("fusion_merge", "torch", "transformers", "lightning-fabric", "datasets")


def provenance(modelpool: CLIPVisionModelPool, taskpool: TaskPool, adapted: dict[str, Any]) -> dict[str, Any]:
    """Return where everything in a run came from.

    Args:
        modelpool: the models.
        taskpool: what was scored, if it has images.
        adapted: for each task that was adapted on, what `data_origin` says of its images.

    Returns:
        `models`, `adapted_on` and `scored_on` by name, and the `machine`.
    """
    return {
        "models": model_origins(modelpool),
        "adapted_on": adapted,
        "scored_on": (
            {name: data_origin(taskpool, name) for name in taskpool.task_names}
            if isinstance(taskpool, CLIPVisionModelTaskPool)
            else {}
        ),
        "machine": machine(),
    }


def scoring_of(model: Any, taskpool: TaskPool, processes: int) -> dict[str, Any]:
    """Return how a model is scored: with batch routing, accuracies depend on what is in one batch.

    Args:
        model: the model.
        taskpool: what it is scored on.
        processes: how many share the images.

    Returns:
        `routing` (None for a static model), `batch_size` and `processes`.
    """
    return {
        "routing": routing_of(model),
        "batch_size": getattr(taskpool, "batch_size", None),
        "processes": processes,
    }


def routing_of(model: nn.Module | Any) -> str | None:
    """Return what a routed model averages its routers' output over: `sample` or `batch`; None for another model.

    Args:
        model: any model.
    """
    if not isinstance(model, MergedCLIPVisionModel) or not model.config.moe:
        return None
    modes = {str(layer.routing.value) for layer in moe_layers(model).values()}
    return modes.pop() if len(modes) == 1 else "mixed"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """Return the `processor`, its `cores`, the `memory_gb` (10⁹ bytes, None where it is not told), and the `gpus`."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "memory_gb": _memory(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def provenance_tables(run: dict[str, Any]) -> str:
    """Return where models and data came from, and how the run was made, in Markdown.

    Args:
        run: the part `run` of a report.
    """
    known = run["provenance"]
    models = [
        [f"`{name}`", m["source"], m["revision"] or f"content {m['fingerprint']}"]
        for name, m in known["models"].items()
    ]
    data = [
        [f"`{name}`", use, d["source"], d["revision"] or "", d["split"] or "", d["images"]]
        for use, table in (("adapted on", known["adapted_on"]), ("scored on", known["scored_on"]))
        for name, d in table.items()
    ]
    about = known["machine"]
    machine_words = [about["processor"], f"{about['cores']} cores"]
    machine_words += [f"{about['memory_gb']} GB"] if about["memory_gb"] else []
    machine_words += about["gpus"] or ["no GPU"]
    parts = [
        tabulate(models, headers=["model", "source", "revision"], tablefmt="github", disable_numparse=True),
        tabulate(
            data,
            headers=["task", "use", "source", "revision", "split", "images"],
            tablefmt="github",
            disable_numparse=True,
        ),
        f"Seed {run['seed']}; " + ", ".join(f"{k} {v}" for k, v in run["versions"].items()) + ".",
        f"Machine: {', '.join(machine_words)}.",
    ]
    return "\n\n".join(parts)


def _processor() -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text(encoding="utf-8").splitlines() if table.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):  # not every system tells
        return None
