"""Configurations of CLIP models: what cannot be is refused before anything is built or read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CLIPVisionConfig, PretrainedConfig
from transformers.activations import ACT2FN
from transformers.models.clip.configuration_clip import CLIPConfig

from fusion_merge.errors import ModelError, nearest

_ARITHMETIC = ("hidden_act", "num_attention_heads", "layer_norm_eps", "image_size", "patch_size")
_VISION_SIZES = {
    "hidden_size": 2**16,
    "intermediate_size": 2**18,
    "num_hidden_layers": 1024,
    "num_attention_heads": 2**12,
    "num_channels": 64,
    "image_size": 2**13,
    "patch_size": 2**13,
}
_TEXT_SIZES = {
    "hidden_size": 2**16,
    "intermediate_size": 2**18,
    "num_hidden_layers": 1024,
    "num_attention_heads": 2**12,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**20,
}
"""The largest sizes that are believed: a wrong one must not take all memory, or days, before it is noticed."""


def plain_config(config: PretrainedConfig) -> dict[str, Any]:
    """Return what a configuration says of a model, without where it came from and what wrote it.

    Args:
        config: of a tower, or of a whole model.
    """
    table = config.to_dict()
    for part in (table, *(value for value in table.values() if isinstance(value, dict))):
        for volatile in ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"):
            part.pop(volatile, None)
    return table


def vision_config(config: Mapping[str, Any], *, where: str) -> CLIPVisionConfig:
    """Return the vision tower's configuration from that of a CLIP model or of a tower alone.

    Args:
        config: the content of a `config.json`.
        where: where it comes from, for errors.

    Raises:
        ModelError: if it is not the configuration of a CLIP model.
    """
    kind = config.get("model_type")
    if kind == "clip":
        both: Any = _parsed(CLIPConfig, config, where)
        found: CLIPVisionConfig = both.vision_config
    elif kind == "clip_vision_model":
        found = _parsed(CLIPVisionConfig, config, where)
    else:
        raise ModelError(
            f"`model_type` is {kind!r} in the config of {where}; a CLIP model has `clip` or `clip_vision_model`"
        )
    _check_sizes(found, _VISION_SIZES, where)
    checked: Any = found  # transformers 5 declares more types than were let through
    patch, image = checked.patch_size, checked.image_size
    if patch > image:
        raise ModelError(f"`patch_size`={patch} is above `image_size`={image} in the config of {where}")
    return found


def _parsed(cls: Any, config: Mapping[str, Any], where: str) -> Any:
    """Return a configuration object, or say what is wrong with the values that it was to be made of."""
    try:
        return cls.from_dict(dict(config))
    except Exception as error:  # transformers checks values with errors of its own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelError(f"the config of {where} cannot be used: {' '.join(lines[:2])}") from error


def _check_sizes(config: Any, largest: Mapping[str, int], where: str) -> None:
    """Refuse a transformer's configuration with which nothing can be computed; transformers 4 believes them all."""
    for key, limit in largest.items():
        value = getattr(config, key)
        if type(value) is not int or not 1 <= value <= limit:
            raise ModelError(f"`{key}`={value!r} in the config of {where} is not a whole number of 1-{limit}")
    if config.hidden_size % config.num_attention_heads:
        raise ModelError(
            f"`hidden_size`={config.hidden_size} in the config of {where} is not a multiple of "
            f"`num_attention_heads`={config.num_attention_heads}"
        )
    eps, act = config.layer_norm_eps, config.hidden_act
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < 1:
        raise ModelError(f"`layer_norm_eps`={eps!r} in the config of {where} is not a number of 0-1, such as 1e-05")
    if not isinstance(act, str) or act not in ACT2FN:
        raise ModelError(f"`hidden_act`={act!r} in the config of {where} is unknown; {nearest(str(act), ACT2FN)}")


def check_same_arithmetic(reference: CLIPVisionConfig, config: CLIPVisionConfig, *, where: str) -> None:
    """Refuse a tower that computes otherwise with the same weights: its merge with others would mean nothing.

    Args:
        reference: the configuration of the pretrained model.
        config: the configuration of the other.
        where: what the other is, for errors.

    Raises:
        ModelError: if they differ; the message names the first key that does.
    """
    for key in _ARITHMETIC:
        own, expected = getattr(config, key), getattr(reference, key)
        if own != expected:
            raise ModelError(
                f"{where} has `{key}`={own!r} in its config, but the pretrained model has {expected!r}; "
                "models are merged only if they compute alike"
            )


def check_whole_clip(config: Mapping[str, Any], *, where: str) -> None:
    """Refuse a model without a text tower, by its configuration.

    Args:
        config: the content of a `config.json`.
        where: where it comes from, for errors.

    Raises:
        ModelError: if it is not a whole CLIP model, or says what cannot be.
    """
    if config.get("model_type") != "clip":
        raise ModelError(
            f"{where} is a {config.get('model_type')!r}, and has no text tower to make heads of; "
            "give a whole CLIP model as `clip_model` of the task pool"
        )
    vision_config(config, where=where)
    both = _parsed(CLIPConfig, config, where)
    _check_sizes(both.text_config, _TEXT_SIZES, f"the text tower of {where}")
    if type(both.projection_dim) is not int or not 1 <= both.projection_dim <= _TEXT_SIZES["hidden_size"]:
        raise ModelError(f"`projection_dim`={both.projection_dim!r} in the config of {where} is not a width")
