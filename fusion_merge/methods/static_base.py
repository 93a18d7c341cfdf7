"""What the static methods share that are more than one formula a tensor: where they compute, and the tower."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from fusion_merge.adaptation.runtime import make_fabric
from fusion_merge.methods.base import Method
from fusion_merge.models.clip import build_tower
from fusion_merge.models.tensor_names import listed_tensors
from fusion_merge.pools.model_pool import PRETRAINED, CLIPVisionModelPool
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool
from fusion_merge.processes import together
from fusion_merge.task_vectors import State, shapes_of

if TYPE_CHECKING:
    from fusion_merge.adaptation.runtime import Fabric


@dataclass(kw_only=True)
class StaticMethod(Method):
    """One plain tower in closed form; with several processes, each makes the same.

    A concrete method says what its tensors are.
    """

    readings: ClassVar[int] = 1
    """How often each model is read; for plans."""

    listing: ClassVar[tuple[str, ...]] = ()
    """The options that list names of tensors."""

    def decompositions(self, num_tasks: int) -> int:
        """Return how many whole singular value decompositions each matrix takes; for plans.

        Args:
            num_tasks: N.
        """
        return 0

    @abstractmethod
    def merge(
        self, modelpool: CLIPVisionModelPool, taskpool: CLIPVisionModelTaskPool | None, device: torch.device
    ) -> State:
        """Return the merged tower's tensors under canonical names, best each formed when it is asked for.

        Args:
            modelpool: the models; not changed.
            taskpool: the tasks.
            device: where to do what is costly.
        """

    def run(
        self,
        modelpool: CLIPVisionModelPool,
        taskpool: CLIPVisionModelTaskPool | None = None,
        fabric: Fabric | None = None,
    ) -> nn.Module:
        """See `Method.run`."""
        self.check(modelpool, taskpool)
        fabric = fabric if fabric is not None else make_fabric()
        with together(), torch.no_grad():
            state = self.merge(modelpool, taskpool, fabric.device)
            return build_tower(modelpool.config(), state, where="the merge").requires_grad_(False)

    def listed(self, option: str, modelpool: CLIPVisionModelPool) -> frozenset[str]:
        """Return the canonical names of the tensors that an option lists.

        Args:
            option: its name.
            modelpool: the models.

        Raises:
            ConfigError: if one is no tensor of the models.
        """
        return listed_tensors(option, getattr(self, option), shapes_of(modelpool.state(PRETRAINED)))

    def check_fit(self, modelpool: CLIPVisionModelPool) -> None:
        """Refuse models that the options do not fit, from file headers alone.

        Args:
            modelpool: the models.

        Raises:
            ConfigError: if they do not.
        """
        for option in self.listing:
            self.listed(option, modelpool)

    def check(self, modelpool: CLIPVisionModelPool, taskpool: CLIPVisionModelTaskPool | None = None) -> None:
        """See `Method.check`: also whether the options fit the models."""
        super().check(modelpool, taskpool)
        self.check_fit(modelpool)
