"""`protocol=generalization`: merge and adapt on some tasks, score others too, and report the two apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from fusion_merge.errors import ConfigError
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool
from fusion_merge.program import FusionProgram
from fusion_merge.protocols.base import Protocol


@final
@dataclass(kw_only=True)
class GeneralizationProtocol(Protocol):
    """The averages over tasks that have a fine-tuned model (seen) and over those that have none (unseen).

    Only the seen tasks are merged and adapted on, as in every run; all are scored.

    Source: Yang et al., "AdaMerging", ICLR 2024, and Tang et al., "WEMoE", ICML 2024: six tasks seen, two unseen.
    """

    def program(self, config: Mapping[str, Any], output_dir: Path, command: str) -> FusionProgram:
        """See `Protocol.program`."""
        program = FusionProgram(config, output_dir, command)
        if not isinstance(program.taskpool, CLIPVisionModelTaskPool):
            raise ConfigError("`protocol=generalization` needs tasks to score on; choose another `taskpool`")
        if not program.method.makes_one_model:
            raise ConfigError(
                f"`protocol=generalization` scores a merged model, but `{program.method.method_name}` makes one model "
                "a task; choose another `method`"
            )
        scored, merged = program.taskpool.task_names, program.modelpool.model_names
        seen, unseen = [t for t in scored if t in merged], [t for t in scored if t not in merged]
        if not unseen:
            raise ConfigError(
                f"`protocol=generalization`: each of the tasks {', '.join(scored)} has a model in the pool, so that "
                "none is unseen; add tasks to the task pool (such as `taskpool=tiny8_generalization`), or take models "
                "from the model pool"
            )
        if not seen:
            raise ConfigError(
                f"`protocol=generalization`: none of the tasks {', '.join(scored)} has a model in the pool (of "
                f"{', '.join(merged) or 'nothing'}), so that none is seen; add some of those to the task pool"
            )
        program.groups = {"seen": seen, "unseen": unseen}
        return program
