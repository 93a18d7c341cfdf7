"""PEFT LoRA adapters as states: the pretrained model plus scaling·B·A, of which the factors can be had alone."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import final

import torch
from torch import Tensor

from fusion_merge.errors import ModelError
from fusion_merge.models.clip import canonical_names
from fusion_merge.models.lora_config import lora_config
from fusion_merge.models.sources import ModelFiles
from fusion_merge.models.tensor_files import HeadedState, LazyState
from fusion_merge.task_vectors import State, shapes_of

log = logging.getLogger(__name__)

_LORA = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(\.(?P<adapter>[^.]+))?\.(?P<kind>weight|bias)$")
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save(\.[^.]+)?)(?=\.(weight|bias)$)")
_ELSEWHERE = {"text_model", "text_projection", "visual_projection", "logit_scale", "classifier"}
"""Parts of models that have a vision tower, beside the tower."""


@dataclass(frozen=True)
class _Pair:
    """Where the two factors of an adapted weight are, and what their product is multiplied by."""

    first: str
    second: str
    scaling: float


@final
class LoraState(HeadedState):
    r"""The state of a pretrained model with a LoRA adapter; each tensor is read and formed when it is asked for.

    .. math:: W = W_0 + s\,B A

    Tensors that the adapter holds whole (trained biases, `modules_to_save`) take the place of the pretrained ones.

    Args:
        pretrained: the state that the adapter is added to, under canonical names.
        files: the adapter's files.
        where: what the adapter is, for errors.
        base: what the pretrained model is called, for a note where the adapter names another.

    Raises:
        ModelError: if the adapter does not fit the pretrained model, holds nothing of a vision tower, or holds what
            cannot be represented exactly.

    Source: Hu et al. 2022 (LoRA), eq. 3; values as PEFT's `merge_and_unload` gives them.
    """

    def __init__(self, pretrained: State, files: ModelFiles, *, where: str, base: str = "") -> None:
        self.pretrained = pretrained
        self.shapes = shapes_of(pretrained)
        self._config = lora_config(files.config, where=where)
        self._where = where
        self._tensors = LazyState(files.weights, lambda names: {name: name for name in names})
        self._tensors.check_floating()
        keys: dict[str, dict[str, str]] = {}
        self._whole: dict[str, str] = {}
        elsewhere = [key for key in self._tensors if not self._sort(key, keys)]
        self._pairs = {name: self._pair(name, sides) for name, sides in keys.items()}
        self._biases = {
            f"{name.removesuffix('.weight')}.bias": (sides["B.bias"], self._pairs[name].scaling)
            for name, sides in keys.items()
            if "B.bias" in sides
        }
        self._check(elsewhere)
        self._tell(elsewhere, base)

    def __getitem__(self, name: str) -> Tensor:
        value = self._tensors[self._whole[name]] if name in self._whole else self.pretrained[name]
        if name in self._biases:
            key, scaling = self._biases[name]
            value = value + scaling * self._tensors[key]
        elif name in self._pairs:
            left, right = self._factors(name)
            value = value + (left @ right).view_as(value)
        if not torch.isfinite(value).all():
            raise ModelError(f"{self._where} would hold NaN or infinite values in `{name}`; use another adapter")
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def factors(self, name: str) -> tuple[Tensor, Tensor] | None:
        r"""Return a weight's task vector in factors, or None where it has none but itself.

        .. math:: \tau = s\,B \cdot A

        Args:
            name: the weight's name.

        Shape:
            (O, I) → (O, r), (r, I); r is 0 where the adapter leaves the weight as it is.
        """
        if len(self.shapes[name]) != 2 or name in self._whole:
            return None
        if name in self._pairs:
            return self._factors(name)
        out_features, in_features = self.shapes[name]
        return torch.zeros(out_features, 0), torch.zeros(0, in_features)

    def check_floating(self) -> None:
        """See `HeadedState.check_floating`: of the adapter, when it was opened; here of the pretrained state."""
        if isinstance(self.pretrained, HeadedState):
            self.pretrained.check_floating()

    def first_row(self, name: str) -> Tensor:
        """See `HeadedState.first_row`: summed in an order of its own, so that it is the same on every machine."""
        if name in self._whole:
            row = self._tensors.first_row(self._whole[name])
        elif isinstance(self.pretrained, HeadedState):
            row = self.pretrained.first_row(name)
        else:
            tensor = self.pretrained[name]
            row = tensor.flatten()[: tensor.shape[-1]]
        if name in self._biases:
            key, scaling = self._biases[name]
            return row + scaling * self._tensors[key]
        if name not in self._pairs:
            return row
        left, right = self._factors(name)
        total = row.double()
        for weight, part in zip(left[0].double(), right[:, : row.numel()].double(), strict=True):
            total = total + weight * part
        return total.to(row)

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        pair = self._pairs[name]
        left, right = self._tensors[pair.second].flatten(1), self._tensors[pair.first].flatten(1)  # (O, r), (r, I)
        return left * pair.scaling, right

    def _sort(self, key: str, pairs: dict[str, dict[str, str]]) -> bool:
        """Put a tensor of the file where it belongs; return whether that is in the vision tower."""
        found = _LORA.match(key)
        if found is None and "lora_" in key:
            raise ModelError(
                f"{self._where} holds `{key}`, and only factors of linear layers and convolutions are read; "
                "merge it with PEFT (`merge_and_unload`), save the model, and give that"
            )
        name = f"{found['module']}.weight" if found else _WRAPPED.sub("", key)
        name = name.removeprefix("base_model.")
        own = next(iter(canonical_names([name])), None)
        if own is None:
            if not _ELSEWHERE & set(name.split(".")):
                raise ModelError(f"{self._where} holds `{key}`, which belongs to no part of a CLIP model")
            return False
        if own not in self.shapes:
            raise self._misfit(f"holds `{key}`, and the pretrained model has no `{own}`")
        if found is None:
            self._put(self._whole, own, key)
            if (shape := self._tensors.shapes[key]) != self.shapes[own]:
                raise self._misfit(f"holds `{key}` of shape {shape}, and `{own}` is of {self.shapes[own]}")
        else:
            side = found["side"] + (".bias" if found["kind"] == "bias" else "")
            self._put(pairs.setdefault(own, {}), side, key)
        return True

    def _put(self, table: dict[str, str], slot: str, key: str) -> None:
        if slot in table:
            raise ModelError(f"{self._where} holds `{table[slot]}` and `{key}`, which are for one tensor; keep one")
        table[slot] = key

    def _pair(self, name: str, sides: Mapping[str, str]) -> _Pair:
        """Return the factors of a weight, whose shapes fit it and each other."""
        for side in ("A", "B"):
            if side not in sides:
                raise ModelError(f"{self._where} lacks `lora_{side}` of `{name}`; save the adapter again")
        first, second = sides["A"], sides["B"]
        module = first.removeprefix("base_model.").removeprefix("model.").partition(".lora_A")[0]
        small, large, shape = self._tensors.shapes[first], self._tensors.shapes[second], self.shapes[name]
        fits = len(small) == len(large) == len(shape) >= 2 and small[0] == large[1]
        if not (fits and small[1:] == shape[1:] and large[0] == shape[0] and set(large[2:]) <= {1}):
            raise self._misfit(f"has factors of shapes {large} and {small} for `{name}`, which is of {shape}")
        bias = f"{name.removesuffix('.weight')}.bias"
        if "B.bias" in sides and self._tensors.shapes[sides["B.bias"]] != self.shapes.get(bias):
            raise self._misfit(f"holds `{sides['B.bias']}`, which does not fit the bias of `{name}`")
        if small[0] != self._config.rank_of(module):
            raise ModelError(
                f"{self._where} has factors of rank {small[0]} for `{name}`, but its adapter_config.json says "
                f"{self._config.rank_of(module)} (`r`, `rank_pattern`); the two files are not of one adapter"
            )
        return _Pair(first, second, self._config.scaling(module))

    def _misfit(self, how: str) -> ModelError:
        base = self._config.base or "another model"
        return ModelError(f"{self._where} {how}; it was made for `{base}`: give that as `_pretrained_`")

    def _check(self, elsewhere: list[str]) -> None:
        """Refuse an adapter of which something is missing."""
        if not (self._pairs or self._whole):
            beside = f", but `{elsewhere[0]}`" if elsewhere else ""
            raise ModelError(f"{self._where} is an adapter that holds nothing of a CLIP vision tower{beside}")
        for name in self._expected_biases():
            if name in self.shapes and name not in self._whole:
                raise ModelError(
                    f"{self._where} has `bias`={self._config.bias!r} in its adapter_config.json, but does not hold "
                    f"`{name}`; save the adapter again"
                )
        held = [*self._whole.values(), *elsewhere]
        for module in self._config.modules_to_save:
            if not any(f".{module}." in f".{key}" for key in held):
                raise ModelError(
                    f"{self._where} has `modules_to_save` with {module!r} in its adapter_config.json, but holds no "
                    "tensor of it; save the adapter again"
                )

    def _expected_biases(self) -> list[str]:
        if self._config.bias == "all":
            return [name for name in self.shapes if name.endswith(".bias")]
        adapted = self._pairs if self._config.bias == "lora_only" else ()
        return [f"{name.removesuffix('.weight')}.bias" for name in adapted]

    def _tell(self, elsewhere: list[str], base: str) -> None:
        """Say what is left aside, and whether the adapter calls its base otherwise."""
        if elsewhere:
            log.info(
                "%s: %d tensors beside the vision tower are left aside, as only that is merged: `%s`, …",
                self._where,
                len(elsewhere),
                elsewhere[0],
            )
        own = self._config.base
        if own and base and PurePath(own).name != PurePath(base.split("@")[0].split(" (")[0]).name:
            log.info("%s says that it was made for `%s`; here it is added to `%s`", self._where, own, base)
