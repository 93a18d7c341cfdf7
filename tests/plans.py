"""What tests of plans share: the command, and models of the shapes that are planned."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from runs import Finished, files_in, own_pool, run_cli
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPVisionConfig

from fusion_merge import EWEMoEAlgorithm, MergedCLIPVisionModel
from fusion_merge.methods.moe_base import MoEMethod
from fusion_merge.models.clip import empty_tower, vision_backbone
from fusion_merge.moe import Routing, route_mlps
from fusion_merge.moe.experts import empty_experts
from fusion_merge.planning.geometry import FLOAT, model_size, vision_geometry
from fusion_merge.planning.needs import Images, Load

SMALL = ["method.cache_dir=null", "method.max_steps=2", "method.batch_size=4"]
RANK = ["method=rankone_moe", "method.rank_k=4"]


def planned(pool_dir: Path, cwd: Path, *more: str, **models: Any) -> tuple[Finished, dict[str, Any]]:
    done = run_cli("plan", *own_pool(pool_dir, **models), "report_save_path=plan.json", *more, cwd=cwd)
    values = json.loads((cwd / "plan.json").read_text())
    assert files_in(cwd) == ["plan.json"]
    assert done.err == ""
    assert done.code == (0 if values["can_start"] else 1)
    return done, values


def tower_config(**changes: Any) -> CLIPVisionConfig:
    sizes = {"hidden_size": 48, "intermediate_size": 144, "num_attention_heads": 3, "num_hidden_layers": 3}
    return CLIPVisionConfig(**(sizes | {"image_size": 32, "patch_size": 8} | changes))


def random_model(method: MoEMethod, config: CLIPVisionConfig, tasks: int) -> MergedCLIPVisionModel:
    """A routed model of the method's shapes; its banks are zero."""
    tower = empty_tower(config)
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, 0, 0.02)
    backbone = vision_backbone(tower)
    routed = route_mlps(
        backbone,
        make_bank=lambda _, linear: empty_experts(
            method.experts_spec(tasks, linear.in_features, linear.out_features)
            | ({"num_values": 0} if isinstance(method, EWEMoEAlgorithm) else {}),
            linear.in_features,
            linear.out_features,
        ),
        make_router=method.router_maker(torch.Generator().manual_seed(0), tasks),
        routing=Routing.BATCH if method.batch_reduce else Routing.SAMPLE,
        chosen=method.routed_blocks(backbone, list),
    )
    names = [str(n) for n in range(tasks)]
    return MergedCLIPVisionModel.from_tower(routed, tasks=names, method="", method_options={}, base_model="")


def start_load(method: MoEMethod, images: int, tasks: int = 4, **changes: Any) -> Load:
    """Routers of a method, in a wider tower, that start from some of 100 images of each task."""
    config = tower_config(**({"hidden_size": 96, "intermediate_size": 384} | changes))
    tower = vision_geometry(config)
    adapted = {str(n): Images(100, FLOAT * tower.inputs, 0) for n in range(tasks)}
    return Load(tower, model_size(method, config, tasks), tasks, base=10**8, adapted=adapted, start_images=images)


def largest(run: Callable[[], object]) -> int:
    """The peak of the bytes that torch allocates, beside what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    found = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: float(e["ts"]))
    return max(e["args"]["Total Allocated"] for e in found) - (
        found[0]["args"]["Total Allocated"] - found[0]["args"]["Bytes"]
    )
