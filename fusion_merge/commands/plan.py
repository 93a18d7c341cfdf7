"""`fusion_merge plan`: what a run would do, need and take, and all that is wrong with it; nothing is computed."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fusion_merge.files import write_text
from fusion_merge.methods.base import Method
from fusion_merge.planning.load import Parts
from fusion_merge.planning.plan import Plan, make_plan
from fusion_merge.planning.problems import Problems, check_models, check_tasks, pools_of
from fusion_merge.planning.text import plan_text, plan_values
from fusion_merge.pools.model_pool import CLIPVisionModelPool
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool, TaskPool
from fusion_merge.program import FusionProgram
from fusion_merge.registry import object_from_config

log = logging.getLogger(__name__)

_KINDS = {"method": Method, "modelpool": CLIPVisionModelPool, "taskpool": TaskPool}


def run(config: Mapping[str, Any], output_dir: Path, typed: str) -> int:
    """See `Command.run`: 1 if there is any problem; `report_save_path` gets the plan as JSON."""
    plan = plan_of(config, output_dir)
    log.info("%s", plan_text(plan))
    if config.get("report_save_path"):
        write_text(config["report_save_path"], json.dumps(plan_values(plan), indent=2))
    return 1 if plan.problems else 0


def plan_of(config: Mapping[str, Any], output_dir: Path) -> Plan:
    """Return the plan of a configuration; what is wrong with it is in the plan.

    Args:
        config: the resolved configuration, as in `config/config.yaml`.
        output_dir: where a run would write.
    """
    problems, made = Problems(), {}
    for name, kind in _KINDS.items():
        with problems.noted():
            made[name] = object_from_config(config[name], name, kind)
    method, modelpool = made.get("method"), made.get("modelpool")
    taskpool = made.get("taskpool")
    tasks = taskpool if isinstance(taskpool, CLIPVisionModelTaskPool) else None
    if modelpool is not None and tasks is not None:
        with problems.noted():
            modelpool.lend_pretrained(tasks)
    if modelpool is not None:
        check_models(problems, modelpool, method)
    if tasks is not None:
        check_tasks(problems, tasks)
    if method is None or modelpool is None:
        return Plan(getattr(method, "method_name", "no method"), "no device", problems=list(problems))
    pools = pools_of(problems, method, modelpool, tasks)
    device, processes = torch.device("cpu"), 1
    with problems.noted():
        method.check(modelpool, tasks)
    if taskpool is not None:
        with problems.noted():
            program = FusionProgram(config, output_dir)
            device, processes = program.check_surroundings()
    return make_plan(Parts(method, modelpool, tasks, pools, device, processes), config, output_dir, problems)
