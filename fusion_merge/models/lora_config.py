"""What `adapter_config.json` says of a PEFT LoRA adapter; what cannot be represented exactly is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fusion_merge.errors import ModelError

_VALUES = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights")
_PARTS = ("bias", "modules_to_save", "base_model_name_or_path", "auto_mapping")
_SELECTIONS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_TRAINING = ("lora_dropout", "inference_mode", "task_type", "peft_version", "revision", "megatron_core")
_STARTS = ("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config")
_BY_VALUES = ("lora_bias", "fan_in_fan_out")  # a bias is in the file; of a linear layer PEFT ignores the other, too
_HARMLESS = {*_VALUES, *_PARTS, *_SELECTIONS, *_TRAINING, *_STARTS, *_BY_VALUES}

_KNOWN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Starts of training that leave the base model as it is."""

_Value = TypeVar("_Value")

_MERGE = "merge it with PEFT (`merge_and_unload`), save the model, and give that"


@dataclass(frozen=True)
class LoraConfig:
    """What decides the values of an adapted model.

    Attributes:
        rank: r where no pattern says otherwise.
        alpha: α where no pattern says otherwise.
        rank_pattern: r by regular expression for the end of a module's name; the first that fits holds.
        alpha_pattern: α in the same way.
        use_rslora: divide α by √r instead of r.
        bias: which biases were trained too: `none`, `all` or `lora_only`.
        modules_to_save: which modules were trained whole.
        base: what the adapter was made for, in its own words.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    bias: str
    modules_to_save: tuple[str, ...]
    base: str | None

    def rank_of(self, module: str) -> int:
        """Return r of a module.

        Args:
            module: its name in the model that the adapter was made for.
        """
        return _first_match(self.rank_pattern, module, self.rank)

    def scaling(self, module: str) -> float:
        r"""Return what the product of the factors is multiplied by.

        .. math:: \alpha / r, \quad\text{or with rsLoRA}\quad \alpha / \sqrt r

        Args:
            module: its name in the model that the adapter was made for.

        Source: Hu et al. 2022 (LoRA), §4.1; Kalajdzievski 2023 (rsLoRA).
        """
        rank, alpha = self.rank_of(module), _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def lora_config(config: Mapping[str, Any], *, where: str) -> LoraConfig:
    """Return the configuration of an adapter.

    Args:
        config: the content of `adapter_config.json`.
        where: what the adapter is, for errors.

    Raises:
        ModelError: if it is not LoRA, or does what pretrained + scaling·B·A does not express, or a value is wrong.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{where} is an adapter with `peft_type`={kind!r}, and only LORA is read; {_MERGE}")
    for key, value in config.items():
        if value and key not in _HARMLESS:
            raise ModelError(
                f"{where} has `{key}`={value!r} in its adapter_config.json, which scaling·B·A does not express; "
                f"{_MERGE}"
            )
    start = config.get("init_lora_weights", True)
    if start not in _KNOWN_STARTS:
        raise ModelError(
            f"{where} has `init_lora_weights`={start!r}: its base is not the pretrained model, but what that start "
            f"left of it; save the adapter with PEFT's `path_initial_model_for_weight_conversion`, or {_MERGE}"
        )
    _check_tower(config, where)
    bias = config.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        raise ModelError(f"{where} has `bias`={bias!r} in its adapter_config.json, not none, all or lora_only")
    saved = config.get("modules_to_save") or ()
    base = config.get("base_model_name_or_path")
    return LoraConfig(
        rank=_whole("r", config.get("r", 8), where),
        alpha=_number("lora_alpha", config.get("lora_alpha", 8), where),
        rank_pattern={k: _whole(f"rank_pattern.{k}", r, where) for k, r in _patterns(config, "rank_pattern", where)},
        alpha_pattern={
            k: _number(f"alpha_pattern.{k}", a, where) for k, a in _patterns(config, "alpha_pattern", where)
        },
        use_rslora=bool(config.get("use_rslora")),
        bias=bias,
        modules_to_save=(saved,) if isinstance(saved, str) else tuple(map(str, saved)),
        base=str(base) if base else None,
    )


def _check_tower(config: Mapping[str, Any], where: str) -> None:
    """Refuse an adapter of a text tower alone, whose tensors may have the names of the vision tower's."""
    mapping = config.get("auto_mapping")
    cls = str(mapping.get("base_model_class")) if isinstance(mapping, Mapping) else ""
    if "Text" in cls:
        raise ModelError(f"{where} is an adapter of a {cls}; give one of the vision tower")


def _patterns(config: Mapping[str, Any], key: str, where: str) -> list[tuple[str, Any]]:
    table = config.get(key) or {}
    if not isinstance(table, Mapping):
        raise ModelError(f"{where} has `{key}`={table!r} in its adapter_config.json, not a table")
    for pattern in table:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ModelError(f"{where} has `{key}` with {pattern!r}, not a regular expression: {error}") from error
    return list(table.items())


def _first_match(table: Mapping[str, _Value], module: str, otherwise: _Value) -> _Value:
    return next((v for pattern, v in table.items() if re.match(rf"(.*\.)?({pattern})$", module)), otherwise)


def _whole(key: str, value: Any, where: str) -> int:
    if type(value) is not int or value < 1:
        raise ModelError(f"{where} has `{key}`={value!r} in its adapter_config.json, not a whole number of at least 1")
    return value


def _number(key: str, value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ModelError(f"{where} has `{key}`={value!r} in its adapter_config.json, not a number")
    return float(value)
