"""RegMean: linear layers whose outputs are nearest to those of all models, each on its own task's images."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fusion_merge.errors import ConfigError, nearest
from fusion_merge.merging.regression import Regression, input_grams
from fusion_merge.merging.vectors import TaskVectors
from fusion_merge.methods.static_base import StaticMethod
from fusion_merge.models.clip import vision_backbone
from fusion_merge.models.tensor_names import linear_weights
from fusion_merge.options import option
from fusion_merge.pools.adaptation_pools import TTA_SPLITS
from fusion_merge.pools.batches import LoadedBatches
from fusion_merge.pools.loaders import Placement, adaptation_loader, fitting_workers
from fusion_merge.pools.model_pool import PRETRAINED, CLIPVisionModelPool
from fusion_merge.pools.revisions import adapted_origins
from fusion_merge.pools.task_pool import CLIPVisionModelTaskPool
from fusion_merge.registry import register_method
from fusion_merge.task_vectors import State, shapes_of

_LOADING = ("batch_size", "num_workers")


@final
@register_method("regmean", aliases=("clip_regmean",))
@dataclass(kw_only=True)
class RegMeanAlgorithm(StaticMethod):
    r"""Static merging by a regression for each linear layer.

    .. math:: W = \Big(\sum_n W_n \tilde G_n\Big) \Big(\sum_n \tilde G_n\Big)^{-1}, \qquad
              G_n = \mathbb{E}_{x \sim n}\, x x^\top, \qquad
              \tilde G_n = \alpha G_n + (1 - \alpha) \operatorname{diag} G_n

    x: the layer's inputs in model n, on images of task n without their labels. All other tensors are averaged.

    Source: Jin et al., ICLR 2023. There the images are of the train split, and sums are inverted in single precision.
    Here they are those of adaptation, their choice is seeded, and sums are solved in double precision; where images say
    nothing of a direction the average stays.
    """

    num_regmean_examples: int = option(256, help="images of each task; all of them where there are fewer", minimum=1)
    reduce_non_diagonal_ratio: float = option(
        0.95, help="α, which all but the diagonal of a Gram matrix is multiplied by", minimum=0.0, maximum=1.0
    )
    exclude_param_names_regex: list[str] | None = option(
        None, help="regular expressions; tensors whose names begin with a match stay pretrained"
    )
    weight_transpose: bool = option(True, help="weights are (out, in), as those of linear layers always are here")
    batch_size: int = option(32, help="images a batch", minimum=1)
    num_workers: int = option(0, help="the most worker processes that read images; sized to the machine", minimum=0)
    dataloader_kwargs: dict[str, Any] | None = option(None, help="batch_size and num_workers as fusion_bench has them")
    tta_split: str = option("test", help="look at images of what is scored, or of another split", choices=TTA_SPLITS)
    seed: int = option(0, help="of the choice of images", minimum=0)

    adapted_on: dict[str, dict[str, Any]] = field(default_factory=dict, init=False, repr=False)
    """Where the images came from, by task."""

    def __post_init__(self) -> None:
        """Check all options."""
        super().__post_init__()
        if not self.weight_transpose:
            raise ConfigError(
                "`weight_transpose`=False is for models that keep weights as (in, out), such as GPT-2; "
                "those of CLIP are (out, in): leave it true"
            )
        for key, value in (self.dataloader_kwargs or {}).items():
            if key not in _LOADING:
                raise ConfigError(f"`dataloader_kwargs.{key}` is not an option here; {nearest(str(key), _LOADING)}")
            if type(value) is not int or value < (key == "batch_size"):
                raise ConfigError(f"`dataloader_kwargs.{key}`={value!r} is not a possible number; see `{key}`")
        for pattern in self.exclude_param_names_regex or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(
                    f"`exclude_param_names_regex` has {pattern!r}, which is no regular expression: {error}"
                ) from error

    @property
    def loading(self) -> dict[str, int]:
        """`batch_size` and `num_workers`, from either place."""
        return {key: getattr(self, key) for key in _LOADING} | (self.dataloader_kwargs or {})

    def check_fit(self, modelpool: CLIPVisionModelPool) -> None:
        """See `StaticMethod.check_fit`: whether each expression matches a name."""
        self._excluded(shapes_of(modelpool.state(PRETRAINED)))

    def check(self, modelpool: CLIPVisionModelPool, taskpool: CLIPVisionModelTaskPool | None = None) -> None:
        """See `Method.check`: also the images."""
        super().check(modelpool, taskpool)
        for pool in set(self.adaptation_pools(modelpool, taskpool).values()):
            pool.check()

    def merge(
        self, modelpool: CLIPVisionModelPool, taskpool: CLIPVisionModelTaskPool | None, device: torch.device
    ) -> State:
        """See `StaticMethod.merge`: one model after the other looks at its images."""
        pretrained = modelpool.state(PRETRAINED)
        excluded = self._excluded(shapes_of(pretrained))
        layers = sorted(name.removesuffix(".weight") for name in linear_weights(modelpool.config()) - excluded)
        pools = self.adaptation_pools(modelpool, taskpool)
        regression = Regression(self.reduce_non_diagonal_ratio)
        for index, name in enumerate(tqdm(modelpool.model_names, desc="looking at images", unit="task", disable=None)):
            tower, state = modelpool.load_model(name), modelpool.state(name)
            vision_backbone(tower).to(device)
            images = (pixels.to(device) for pixels in self._images(pools[name], name, self.seed * 1009 + index))
            grams = input_grams(vision_backbone(tower), layers, images)
            del tower
            regression.add(grams, lambda layer, s=state: s[f"{layer}.weight"] - pretrained[f"{layer}.weight"])  # type: ignore[misc]
            del grams
        self.adapted_on = adapted_origins(pools)

        def combine(name: str, stacked: Tensor) -> Tensor:
            average, layer = stacked.mean(dim=0), name.removesuffix(".weight")
            return regression.solution(layer, average, device) if layer in regression and layer != name else average

        finetuned = [modelpool.state(name) for name in modelpool.model_names]
        return TaskVectors(pretrained, finetuned, leave=excluded).merged(combine)

    def _images(self, pool: CLIPVisionModelTaskPool, name: str, seed: int) -> Iterator[Tensor]:
        """Give batches of different images of a task, each (B, 3, height, width)."""
        loading = self.loading
        images = pool.images(name)
        left = min(self.num_regmean_examples, len(images))
        workers = fitting_workers(loading["num_workers"], 1)
        batches = iter(adaptation_loader(images, loading["batch_size"], seed, workers=workers, placement=Placement()))
        try:
            while left > 0:
                pixels = next(batches)[0][:left]
                left -= len(pixels)
                yield pixels
        finally:
            if isinstance(batches, LoadedBatches):
                batches.close()

    def _excluded(self, names: Collection[str]) -> frozenset[str]:
        """Return which tensors the expressions match, under their own names or as transformers 4 calls them."""
        found: set[str] = set()
        for pattern in self.exclude_param_names_regex or ():
            matched = {n for n in names if re.match(pattern, n) or re.match(pattern, f"vision_model.{n}")}
            if not matched:
                raise ConfigError(
                    f"`exclude_param_names_regex` has {pattern!r}, which no name of a tensor begins with; "
                    "names are such as encoder.layers.0.mlp.fc1.weight"
                )
            found |= matched
        return frozenset(found)
