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
from fusion_merge.models.offline import without_network
from fusion_merge.planning.load import Parts
from fusion_merge.planning.plan import Plan, make_plan
from fusion_merge.planning.problems import Problems, check_models, check_tasks, pools_of
from fusion_merge.planning.text import plan_text, plan_values
from fusion_merge.pools.model_pool import CLIPVisionModelPool
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool, TaskPool
from fusion_merge.program import task_pool_config
from fusion_merge.protocols.base import Program, make_program
from fusion_merge.registry import object_from_config

log = logging.getLogger(__name__)


def run(config: Mapping[str, Any], output_dir: Path, typed: str) -> int:
    """See `Command.run`: 1 if there is any problem; `report_save_path` gets the plan as JSON."""
    with without_network():
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
    problems = Problems()
    program: Program | None = None
    with problems.noted():
        program = make_program(config, output_dir, "")
    method, modelpool, taskpool = _parts(config, program, problems)
    tasks = taskpool if isinstance(taskpool, CLIPVisionModelTaskPool) else None
    if modelpool is not None:
        check_models(problems, modelpool, method)
    if tasks is not None:
        check_tasks(problems, tasks)
    if method is None or modelpool is None:
        return Plan(getattr(method, "method_name", "no method"), "no device", problems=list(problems))
    pools = pools_of(problems, method, modelpool, tasks)
    with problems.noted():
        method.check(modelpool, tasks)
    device, processes, runs = torch.device("cpu"), 1, 1
    if program is not None:
        runs = program.runs
        with problems.noted():
            program.usual.check_routings()
        with problems.noted():
            device, processes = program.usual.check_surroundings()
        if not problems:  # what is left: a run would refuse it
            with problems.noted():
                program.check()
    return make_plan(Parts(method, modelpool, tasks, pools, device, processes, runs), config, output_dir, problems)


def _parts(
    config: Mapping[str, Any], program: Program | None, problems: Problems
) -> tuple[Method | None, CLIPVisionModelPool | None, TaskPool | None]:
    """Return method, models and tasks; where they do not make a program, those that can be made by themselves."""
    if program is not None:
        return program.usual.method, program.usual.modelpool, program.usual.taskpool
    method = modelpool = taskpool = None
    with problems.noted():
        method = object_from_config(config["method"], "method", Method)
    with problems.noted():
        modelpool = object_from_config(config["modelpool"], "modelpool", CLIPVisionModelPool)
    with problems.noted():
        tasks = config["taskpool"] if modelpool is None else task_pool_config(config, modelpool)
        taskpool = object_from_config(tasks, "taskpool", TaskPool)
    if modelpool is not None and isinstance(taskpool, CLIPVisionModelTaskPool):
        with problems.noted():
            modelpool.lend_pretrained(taskpool)
    return method, modelpool, taskpool
