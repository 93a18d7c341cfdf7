"""Router checkpoints: the routers alone, and what they belong to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fusion_merge.errors import CheckpointError
from fusion_merge.files import atomic
from fusion_merge.moe import moe_layers

FORMAT = 1


def router_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of all routers by layer; a shared router's stand under its first layer.

    Args:
        model: a model with routed MLPs.
    """
    routers = nn.ModuleDict({name.replace(".", "/"): layer.router for name, layer in moe_layers(model).items()})
    return {name.replace("/", "."): parameter for name, parameter in routers.named_parameters()}


def save_routers(path: Path | str, model: nn.Module, belongs_to: Mapping[str, Any]) -> None:
    """Write the routers of a model, whole or not at all.

    Args:
        path: where; any ending will do, the content is safetensors.
        model: a model with routed MLPs.
        belongs_to: what the routers fit, as plain values: method, options, tasks, fingerprints.

    Raises:
        FusionMergeError: if the file cannot be written.
    """
    tensors = {name: p.detach().to("cpu").contiguous() for name, p in router_state(model).items()}
    metadata = {"format": "pt", "fusion_merge": json.dumps({"version": FORMAT, **belongs_to})}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def check_routers(path: Path | str, belongs_to: Mapping[str, Any]) -> None:
    """Refuse a router checkpoint that does not fit, from its header alone.

    Args:
        path: what `save_routers` wrote.
        belongs_to: what the routers must fit.

    Raises:
        CheckpointError: if the file cannot be read or does not fit; the message says what differs.
    """
    _read(path, belongs_to)


def load_routers(path: Path | str, model: nn.Module, belongs_to: Mapping[str, Any]) -> None:
    """Read routers into a model.

    Args:
        path: what `save_routers` wrote.
        model: a model with routed MLPs; its routers are changed.
        belongs_to: what the routers must fit.

    Raises:
        CheckpointError: if the file cannot be read or does not fit; the message says what differs.
    """
    tensors = _read(path, belongs_to, tensors=True)
    own = router_state(model)
    there, here = ({n: list(t.shape) for n, t in state.items()} for state in (tensors, own))
    if differences := _differences(there, here):
        raise CheckpointError(f"router checkpoint `{path}` does not fit: shape of " + "; ".join(differences[:3]))
    for name, parameter in own.items():
        parameter.data.copy_(tensors[name])


def _read(path: Path | str, belongs_to: Mapping[str, Any], *, tensors: bool = False) -> dict[str, Tensor]:
    """Check what a file belongs to; return its tensors, if they are wanted."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise CheckpointError(f"router checkpoint `{file}` does not exist")
    try:
        with safe_open(file, framework="pt") as handle:
            stored = json.loads((handle.metadata() or {}).get("fusion_merge", "null"))
            found = {name: handle.get_tensor(name) for name in (list(handle.keys()) if tensors else [])}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"cannot read router checkpoint `{file}`: {str(error).splitlines()[0]}") from error
    if not isinstance(stored, dict):
        raise CheckpointError(f"`{file}` is not a router checkpoint: it does not say what its routers belong to")
    expected = json.loads(json.dumps({"version": FORMAT, **belongs_to}))
    if differences := _differences(stored, expected):
        raise CheckpointError(f"router checkpoint `{file}` does not fit: " + "; ".join(differences))
    return found


def _differences(stored: Any, expected: Any, path: str = "") -> list[str]:
    if isinstance(stored, dict) and isinstance(expected, dict):
        keys = sorted(stored.keys() | expected.keys())
        return [
            line
            for key in keys
            for line in _differences(stored.get(key), expected.get(key), f"{path}.{key}".lstrip("."))
        ]
    if stored == expected:
        return []
    return [f"`{path}` is {stored!r} there and {expected!r} here"]
