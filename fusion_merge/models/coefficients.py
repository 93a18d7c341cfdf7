"""A static merge whose coefficients can be trained: the tower is merged anew in each forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import CLIPVisionConfig, CLIPVisionModel

from fusion_merge.models.clip import build_tower, vision_backbone
from fusion_merge.task_vectors import State, check_same_shapes


@final
class CoefficientMerge(nn.Module):
    r"""A vision tower with one merging coefficient for each task, or for each task and tensor.

    .. math:: \theta_l = \theta_{0l} + \sum_n \lambda_{nl}\, \tau_{nl}

    Gradients reach the coefficients alone.

    Args:
        config: the tower's configuration.
        pretrained: its tensors, under canonical names.
        finetuned: the N states that were fine-tuned from it.
        init_values: λ, where every coefficient starts.
        layer_wise: one coefficient for each tensor l of each task, instead of one for each task.
        clamp: whether coefficients count as 0 below 0, and as 1 above 1.

    Shape:
        `coefficients` (N, L) if `layer_wise`, L the number of tensors, else (N, 1).

    Raises:
        ModelError: if names or shapes differ.
    """

    def __init__(
        self,
        config: CLIPVisionConfig,
        pretrained: State,
        finetuned: Sequence[State],
        *,
        init_values: float,
        layer_wise: bool,
        clamp: bool = False,
    ) -> None:
        super().__init__()
        for state in finetuned:
            check_same_shapes(pretrained, state)
        self._config = config
        self.tower = vision_backbone(build_tower(config, pretrained, where="the pretrained model")).requires_grad_(
            False
        )
        self.clamp = clamp
        self._names = [name for name, tensor in self.tower.named_parameters() if tensor.is_floating_point()]
        for index, name in enumerate(self._names):
            base = pretrained[name]
            vectors = torch.stack([state[name] - base for state in finetuned])  # (N, …)
            self.register_buffer(f"task_vectors_{index}", vectors, persistent=False)
        columns = len(self._names) if layer_wise else 1
        self.coefficients = nn.Parameter(torch.full((len(finetuned), columns), float(init_values)))

    @property
    def tensor_names(self) -> list[str]:
        """The tensors that are merged, in the order of a layer-wise merge's columns."""
        return list(self._names)

    def effective(self) -> Tensor:
        """Return the coefficients as they count.

        Shape:
            → (N, L) or (N, 1).
        """
        return self.coefficients.clamp(0, 1) if self.clamp else self.coefficients

    def merged(self) -> dict[str, Tensor]:
        """Return the merged tensors, with gradients to the coefficients where these are on."""
        coefficients, own = self.effective(), dict(self.tower.named_parameters())
        last = coefficients.shape[1] - 1
        return {
            name: own[name]
            + torch.tensordot(coefficients[:, min(index, last)], getattr(self, f"task_vectors_{index}"), dims=1)
            for index, name in enumerate(self._names)
        }

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """Return what the merged tower returns, `pooler_output` (B, D) included.

        Args:
            pixel_values: images.
            **kwargs: what `CLIPVisionModel.forward` takes besides.

        Shape:
            pixel_values (B, 3, height, width).
        """
        return functional_call(self.tower, self.merged(), kwargs={"pixel_values": pixel_values, **kwargs})

    @torch.no_grad()
    def to_tower(self) -> CLIPVisionModel:
        """Return the merge as a plain tower of its own, where this one is.

        Raises:
            ModelError: if the merge is not finite.
        """
        state: Mapping[str, Tensor] = {
            **self.tower.state_dict(),
            **self.merged(),
        }
        tower = build_tower(self._config, {n: t.cpu() for n, t in state.items()}, where="the merge")
        return tower.requires_grad_(False).to(self.coefficients.device)  # type: ignore[arg-type]
