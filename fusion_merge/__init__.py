"""fusion_merge: fine-tuned CLIP models become one routed model.

Names are imported when they are first used, so that `import fusion_merge` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusion_merge.methods.clip_finetune import CLIPFinetuneAlgorithm
    from fusion_merge.methods.dare import DareAlgorithm
    from fusion_merge.methods.dummy import DummyAlgorithm
    from fusion_merge.methods.e_wemoe import EWEMoEAlgorithm
    from fusion_merge.methods.fusion_moe import FusionMoEAlgorithm
    from fusion_merge.methods.iso_c import IsoCAlgorithm
    from fusion_merge.methods.iso_cts import IsoCTSAlgorithm
    from fusion_merge.methods.layer_wise_adamerging import LayerWiseAdaMergingAlgorithm
    from fusion_merge.methods.rankone_moe import RankOneMoEAlgorithm
    from fusion_merge.methods.regmean import RegMeanAlgorithm
    from fusion_merge.methods.simple_average import SimpleAverageAlgorithm
    from fusion_merge.methods.simple_ensemble import SimpleEnsembleAlgorithm
    from fusion_merge.methods.smile import SmileAlgorithm
    from fusion_merge.methods.task_arithmetic import TaskArithmeticAlgorithm
    from fusion_merge.methods.task_wise_adamerging import TaskWiseAdaMergingAlgorithm
    from fusion_merge.methods.ties_merging import TiesMergingAlgorithm
    from fusion_merge.methods.tsv_m import TSVMAlgorithm
    from fusion_merge.methods.wemoe import WEMoEAlgorithm
    from fusion_merge.models.merged import MergedCLIPVisionConfig, MergedCLIPVisionModel
    from fusion_merge.moe import set_routing
    from fusion_merge.pools.model_pool import CLIPVisionModelPool
    from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool, DummyTaskPool
    from fusion_merge.registry import get_method, list_methods, register_method

__version__ = "0.1.0"

_HOMES = {
    "CLIPFinetuneAlgorithm": "methods.clip_finetune",
    "CLIPVisionModelPool": "pools.model_pool",
    "CLIPVisionModelTaskPool": "pools.task_pool",
    "DareAlgorithm": "methods.dare",
    "DummyAlgorithm": "methods.dummy",
    "DummyTaskPool": "pools.task_pool",
    "EWEMoEAlgorithm": "methods.e_wemoe",
    "FusionMoEAlgorithm": "methods.fusion_moe",
    "IsoCAlgorithm": "methods.iso_c",
    "IsoCTSAlgorithm": "methods.iso_cts",
    "LayerWiseAdaMergingAlgorithm": "methods.layer_wise_adamerging",
    "MergedCLIPVisionConfig": "models.merged",
    "MergedCLIPVisionModel": "models.merged",
    "RankOneMoEAlgorithm": "methods.rankone_moe",
    "RegMeanAlgorithm": "methods.regmean",
    "SimpleAverageAlgorithm": "methods.simple_average",
    "SimpleEnsembleAlgorithm": "methods.simple_ensemble",
    "SmileAlgorithm": "methods.smile",
    "TSVMAlgorithm": "methods.tsv_m",
    "TaskArithmeticAlgorithm": "methods.task_arithmetic",
    "TaskWiseAdaMergingAlgorithm": "methods.task_wise_adamerging",
    "TiesMergingAlgorithm": "methods.ties_merging",
    "WEMoEAlgorithm": "methods.wemoe",
    "get_method": "registry",
    "list_methods": "registry",
    "register_method": "registry",
    "set_routing": "moe",
}

__all__ = [
    "CLIPFinetuneAlgorithm",
    "CLIPVisionModelPool",
    "CLIPVisionModelTaskPool",
    "DareAlgorithm",
    "DummyAlgorithm",
    "DummyTaskPool",
    "EWEMoEAlgorithm",
    "FusionMoEAlgorithm",
    "IsoCAlgorithm",
    "IsoCTSAlgorithm",
    "LayerWiseAdaMergingAlgorithm",
    "MergedCLIPVisionConfig",
    "MergedCLIPVisionModel",
    "RankOneMoEAlgorithm",
    "RegMeanAlgorithm",
    "SimpleAverageAlgorithm",
    "SimpleEnsembleAlgorithm",
    "SmileAlgorithm",
    "TSVMAlgorithm",
    "TaskArithmeticAlgorithm",
    "TaskWiseAdaMergingAlgorithm",
    "TiesMergingAlgorithm",
    "WEMoEAlgorithm",
    "__version__",
    "get_method",
    "list_methods",
    "register_method",
    "set_routing",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module `fusion_merge` has no attribute `{name}`")
    return getattr(import_module(f"fusion_merge.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
