"""The files of a merged model: written as one, and read back exactly."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from torch import Tensor

from fusion_merge.commits import atomic_files
from fusion_merge.errors import CheckpointError
from fusion_merge.models.merged_config import MergedCLIPVisionConfig
from fusion_merge.models.sources import WEIGHT_PATTERNS, LazyState, ModelFiles
from fusion_merge.sealed import checksum


def write_model(
    folder: Path | str,
    state: Mapping[str, Tensor],
    config: MergedCLIPVisionConfig,
    card: str,
    *,
    max_shard_size: int | str,
) -> None:
    """Write all files of a model; whatever model was in the folder is replaced as a whole or not at all.

    Args:
        folder: where; it is made.
        state: the tensors, on the CPU.
        config: what the model is made of, with the checksum of the tensors.
        card: the model card in Markdown.
        max_shard_size: the size above which tensors go to several files.

    Raises:
        FusionMergeError: if the folder cannot be written.
    """
    with atomic_files(folder, replaces=WEIGHT_PATTERNS) as place:
        with _quiet():  # the hub's library would name the temporary folder
            save_torch_state_dict(dict(state), place, max_shard_size=max_shard_size)
        config.save_pretrained(place)
        (place / "README.md").write_text(card, encoding="utf-8")


def write_description(folder: Path | str, config: MergedCLIPVisionConfig, card: str) -> None:
    """Write the configuration and the card of a model whose tensors are there already.

    Args:
        folder: where the model is.
        config: what the model is made of.
        card: the model card in Markdown.

    Raises:
        FusionMergeError: if the folder cannot be written.
    """
    with atomic_files(folder, replaces=()) as place:
        config.save_pretrained(place)
        (place / "README.md").write_text(card, encoding="utf-8")


def read_exactly(files: ModelFiles, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read the tensors of a model; they must be those that its configuration was written with.

    Args:
        files: the files, the configuration checked by `check_seal`.
        shapes: the shape of each tensor that the model has.

    Raises:
        CheckpointError: if a tensor is missing, unexpected, of another shape, or was changed.
        ModelError: if a file cannot be read.
    """
    state = LazyState(files.weights, lambda names: {name: name for name in names}, None)
    for problem, names in (
        ("lacks", shapes.keys() - state.keys()),
        ("holds, unexpectedly,", state.keys() - shapes.keys()),
    ):
        if names:
            raise CheckpointError(f"`{files.origin}` {problem} `{min(names)}` and {len(names) - 1} more tensors")
    for name, shape in shapes.items():
        if state.shapes[name] != shape:
            raise CheckpointError(f"`{files.origin}` has `{name}` of shape {state.shapes[name]}, not {shape}")
    tensors = dict(state)
    if checksum(tensors) != files.config["checksum"]:
        raise CheckpointError(
            f"`{files.origin}` is damaged: its weights are not those that were written; use another copy"
        )
    return tensors


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)
