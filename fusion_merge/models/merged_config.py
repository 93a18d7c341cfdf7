"""The configuration of a merged model: all that its tensors do not say."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class MergedCLIPVisionConfig(PretrainedConfig):
    """What a merged model is made of.

    Args:
        vision_config: the configuration of the CLIP vision tower, as plain values.
        moe: for each routed MLP, by name, what `MoEMLP.spec` returned.
        shared_router: whether all routed MLPs share one router.
        tasks: the tasks that were merged, in the order of their experts.
        method: the name of the method.
        method_options: its options, as plain values.
        base_model: where the pretrained model came from.
        models: where each task's fine-tuned model came from.
        measured_tasks: the tasks whose mean merging coefficients the model holds.
        scores: the model's accuracies in 0-1 by task, where they are known.
        command: the command that made the model, if there was one.
        checksum: of all tensors, as `fusion_merge.sealed.checksum` forms it.
        **kwargs: whatever else a configuration may carry.
    """

    model_type = "fusion_merge_clip_vision"

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        moe: dict[str, dict[str, Any]] | None = None,
        shared_router: bool = False,
        tasks: list[str] | None = None,
        method: str = "",
        method_options: dict[str, Any] | None = None,
        base_model: str = "",
        models: dict[str, str] | None = None,
        measured_tasks: list[str] | None = None,
        scores: dict[str, float] | None = None,
        command: str = "",
        checksum: str = "",
        **kwargs: Any,
    ) -> None:
        self.vision_config = dict(vision_config or {"model_type": "clip_vision_model"})
        self.moe = dict(moe or {})
        self.shared_router = shared_router
        self.tasks = list(tasks or [])
        self.method = method
        self.method_options = dict(method_options or {})
        self.base_model = base_model
        self.models = dict(models or {})
        self.measured_tasks = list(measured_tasks or [])
        self.scores = dict(scores or {})
        self.command = command
        self.checksum = checksum
        super().__init__(**kwargs)
