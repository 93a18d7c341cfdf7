"""The configuration of a merged model: all that its tensors do not say."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from fusion_merge.errors import CheckpointError
from fusion_merge.sealed import text_checksum


class MergedCLIPVisionConfig(PretrainedConfig):
    """What a merged model is made of.

    `config.json` carries a checksum of all that is said here, formed whenever it is written; see `check_seal`.

    Args:
        vision_config: the configuration of the CLIP vision tower, as plain values.
        moe: for each routed block, by name, what `RoutedBlock.spec` returned.
        linears: for each linear layer with experts of its own, by name, what `ProjectionMoELinear.spec` returned.
        shared_router: whether all routed blocks share one router.
        tasks: the tasks that were merged, in the order of their experts.
        method: the name of the method.
        method_options: its options, as plain values.
        base_model: where the pretrained model came from.
        models: where each task's fine-tuned model came from.
        measured_tasks: the tasks whose mean merging coefficients the model holds.
        measured_inputs: of how many images a task, and how wide, the model holds what its routers read; None if it
            holds none.
        heads: what `TaskHeads.spec` returned, where the model holds heads.
        scores: the model's accuracies in 0-1 by task, where they are known.
        command: the command that made the model, if there was one.
        checksum: of all tensors, as `fusion_merge.sealed.checksum` forms it.
        config_checksum: of all of the above, as it was when `config.json` was written or read.
        **kwargs: whatever else a configuration may carry.
    """

    model_type = "fusion_merge_clip_vision"

    def __init__(
        self,
        vision_config: dict[str, Any] | None = None,
        moe: dict[str, dict[str, Any]] | None = None,
        linears: dict[str, dict[str, Any]] | None = None,
        shared_router: bool = False,
        tasks: list[str] | None = None,
        method: str = "",
        method_options: dict[str, Any] | None = None,
        base_model: str = "",
        models: dict[str, str] | None = None,
        measured_tasks: list[str] | None = None,
        measured_inputs: list[int] | None = None,
        heads: list[dict[str, Any]] | None = None,
        scores: dict[str, float] | None = None,
        command: str = "",
        checksum: str = "",
        config_checksum: str = "",
        **kwargs: Any,
    ) -> None:
        self.vision_config = dict(vision_config or {"model_type": "clip_vision_model"})
        self.moe = dict(moe or {})
        self.linears = dict(linears or {})
        self.shared_router = shared_router
        self.tasks = list(tasks or [])
        self.method = method
        self.method_options = dict(method_options or {})
        self.base_model = base_model
        self.models = dict(models or {})
        self.measured_tasks = list(measured_tasks or [])
        self.measured_inputs = list(measured_inputs) if measured_inputs else None
        self.heads = [dict(head) for head in heads or ()]
        self.scores = dict(scores or {})
        self.command = command
        self.checksum = checksum
        self.config_checksum = config_checksum
        super().__init__(**kwargs)

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return what `config.json` holds, the checksum of its fields included.

        Args:
            use_diff: whether transformers' own fields are left out where they have their usual values.
        """
        table = json.loads(super().to_json_string(use_diff))
        table["config_checksum"] = fields_checksum(table)
        return json.dumps(table, indent=2, sort_keys=True) + "\n"

    def seal(self) -> None:
        """Form the checksum of the fields as they are now."""
        self.config_checksum = self._current_checksum()

    def overrides(self, table: Mapping[str, Any]) -> bool:
        """Tell whether this configuration is to be used in place of that of a file: not if it is merely another file's.

        transformers reads `config.json` by itself and passes it along; where a save was interrupted, that may be the
        file of an earlier model.

        Args:
            table: the content of the file.
        """
        stored = self.config_checksum
        return stored == table.get("config_checksum") or stored != self._current_checksum()

    def _current_checksum(self) -> str:
        current: str = json.loads(self.to_json_string())["config_checksum"]
        return current


_SEALED = inspect.signature(MergedCLIPVisionConfig.__init__).parameters.keys() - {"self", "config_checksum", "kwargs"}


def fields_checksum(table: Mapping[str, Any]) -> str:
    """Return the checksum of our own fields, whatever transformers writes beside them.

    Args:
        table: the content of `config.json`.
    """
    return text_checksum(json.dumps({name: table[name] for name in _SEALED if name in table}, sort_keys=True))


def check_seal(table: Mapping[str, Any], where: str) -> None:
    """Refuse a configuration that was changed since it was written, or that carries no checksums.

    Args:
        table: the content of `config.json`.
        where: what holds it, for the error.

    Raises:
        CheckpointError: if a checksum is missing, or is not that of the fields.
    """
    if not table.get("checksum") or not table.get("config_checksum"):
        raise CheckpointError(
            f"`{where}` is damaged: its configuration is not what was written, as it carries no checksum; "
            "use another copy, or save the model again if an earlier version wrote it"
        )
    if table["config_checksum"] != fields_checksum(table):
        raise CheckpointError(f"`{where}` is damaged: its configuration is not what was written; use another copy")
