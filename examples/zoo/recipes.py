"""What the embedded pools are pretrained with; `make_pool.sh` has how their towers are fine-tuned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

from fusion_merge.zoo import tiny8, tiny20


@dataclass(frozen=True)
class Recipe:
    """How the pretrained model of a pool is made.

    Attributes:
        module: where its tasks are.
        images: images of each class that pretraining sees, for each task.
        shares: how often each task is drawn, in proportion.
        intermediate_size: width of the MLPs of the vision tower.
        steps: steps of the vision tower.
        final_logit_scale: from the end of pretraining on, which is what fine-tuning and adaptation see.
        balanced: whether scales are moved so that fine-tuning changes the MLPs most.
    """

    module: ModuleType
    images: Mapping[str, int]
    shares: Mapping[str, float]
    intermediate_size: int
    steps: int
    final_logit_scale: float
    balanced: bool

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks."""
        return tuple(self.images)


_TEN = tiny8.TASKS + tiny8.UNSEEN_TASKS
_IMAGES = dict(zip(_TEN, (100, 120, 80, 80, 80, 30, 20, 30, 60, 20), strict=True))

RECIPES: dict[str, Recipe] = {
    "tiny8": Recipe(
        module=tiny8,
        images=_IMAGES,
        shares=dict(zip(_TEN, (1.5, 1.5, 1.0, 2.0, 2.0, 0.6, 0.4, 0.6, 1.0, 0.3), strict=True)),
        intermediate_size=768,
        steps=2600,
        final_logit_scale=5.0,  # with it, fine-tuning is never done, and entropy tells experts from mixtures
        balanced=True,
    ),
    "tiny8_hard": Recipe(
        module=tiny8,
        images=_IMAGES,
        shares=dict(zip(_TEN, (1.5, 1.5, 0.9, 2.3, 2.5, 0.5, 0.2, 0.7, 1.0, 0.3), strict=True)),
        intermediate_size=256,
        steps=850,
        final_logit_scale=20.0,
        balanced=False,
    ),
    "tiny20": Recipe(
        module=tiny20,
        images={task: _IMAGES.get(task, 80) for task in tiny20.TASKS},
        shares={task: len(tiny20.classnames(task)) ** 0.5 for task in tiny20.TASKS},
        intermediate_size=256,
        steps=3000,
        final_logit_scale=5.0,
        balanced=True,
    ),
}
