"""What a run writes, how much it is, and where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_merge.adaptation.checkpoint import called
from fusion_merge.methods.adapted_base import AdaptedMethod
from fusion_merge.methods.clip_finetune import CLIPFinetuneAlgorithm
from fusion_merge.planning.geometry import FLOAT
from fusion_merge.planning.load import Parts
from fusion_merge.planning.machine import disk_of, free_disk
from fusion_merge.planning.needs import Load

_REPORTS = 2 * 10**6
_HEADERS = 100 * 10**3


@dataclass(frozen=True)
class Writing:
    """One thing that is written.

    Attributes:
        what: it is.
        path: where it goes.
        bytes: the most that it takes.
        free: bytes that are free there; None where that is not known.
        disk: which file system it is on.
    """

    what: str
    path: str
    bytes: int
    free: int | None
    disk: int


def writings(parts: Parts, load: Load, config: Mapping[str, Any], output_dir: Path, num_tasks: int) -> list[Writing]:
    """Return what a run writes.

    Args:
        parts: what the run is made of.
        load: what the run consists of.
        config: the resolved configuration.
        output_dir: where reports go.
        num_tasks: that are trained on.
    """
    method, runs = parts.method, parts.runs
    found = [_writing("reports and logs", output_dir, runs * _REPORTS)]
    if folder := config.get("merged_model_save_path"):
        found.append(_writing("merged model", folder, runs * (load.model.bytes + load.model.described + _HEADERS)))
    if isinstance(method, AdaptedMethod):
        if method.save_checkpoint:
            what = called(method.adapted_part)
            found.append(_writing(what, method.save_checkpoint, runs * router_checkpoint(load)))
        if load.training is not None and method.cache_dir is not None and not method.fast_dev_run:
            kept = (4 if method.optimizer != "sgd" else 2) + (num_tasks if method.guard == "rollback" else 0)
            state = kept * load.model.router_bytes + 8 * num_tasks * method.max_steps + _HEADERS
            # a new one is written before the earlier one goes
            found.append(_writing("state of the adaptation", method.cache_dir, 2 * state))
    if isinstance(method, CLIPFinetuneAlgorithm) and method.output is not None and not method.fast_dev_run:
        wide = FLOAT if method.dtype == "float32" else FLOAT // 2
        found.append(_writing("fine-tuned towers", method.output, num_tasks * wide * load.tower.numbers))
    return found


def router_checkpoint(load: Load) -> int:
    """Return the bytes of a router checkpoint.

    Args:
        load: what the run consists of.
    """
    coefficients = FLOAT * load.num_models * len(load.model.router_widths) * load.model.coefficients
    return load.model.router_bytes + coefficients + load.model.input_bytes + _HEADERS


def _writing(what: str, path: Any, size: int) -> Writing:
    place = Path(path).expanduser()
    return Writing(what, str(path), size, free_disk(place), disk_of(place))
