"""What tests share beside fixtures."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.nn import functional as F

from fusion_merge.moe import (
    DenseExperts,
    Experts,
    LinearDelta,
    LowRankExperts,
    Router,
    Routing,
    SparseExperts,
    make_router,
    upcycle_mlps,
)
from fusion_merge.moe.experts import TaskVector
from fusion_merge.moe.selection import Selection

TASKS = {"cats": ("tabby", "siamese"), "dogs": ("beagle", "poodle", "husky")}


def write_processor(folder: Path, size: int) -> None:
    """Write the files of a CLIP processor whose vocabulary is single bytes."""
    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 24, "pad_token": "<|endoftext|>"})
    )
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "CLIPImageProcessor",
                "size": {"shortest_edge": size},
                "crop_size": {"height": size, "width": size},
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
            }
        )
    )


class ToyMLP(nn.Module):
    """A plain transformer MLP."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.activation_fn = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(tokens)))


class ToyTower(nn.Module):
    """A stand-in for a vision tower: "pixels" are tokens (B, T, width), layers are residual MLPs."""

    def __init__(self, width: int = 6, hidden: int = 10, depth: int = 2) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.layers = nn.ModuleList([ToyMLP(width, hidden) for _ in range(depth)])

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens = pixel_values * self.scale
        for layer in self.layers:
            tokens = tokens + layer(tokens)
        return tokens.mean(dim=1)  # (B, width)


def toy_states(num_tasks: int = 3, seed: int = 0, noise: float = 0.3) -> tuple[ToyTower, list[dict[str, Tensor]]]:
    """Return a pretrained toy tower and the states of towers fine-tuned from it by noise."""
    generator = torch.Generator().manual_seed(seed)
    tower = ToyTower()
    for parameter in tower.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    pretrained = tower.state_dict()
    finetuned = [
        {name: t + noise * torch.randn(t.shape, generator=generator) for name, t in pretrained.items()}
        for _ in range(num_tasks)
    ]
    return tower, finetuned


def random_task_vectors(
    num_tasks: int, out_features: int, in_features: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> list[TaskVector]:
    """Return random task vectors of one linear layer."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    return [TaskVector(draw(out_features, in_features), draw(out_features)) for _ in range(num_tasks)]


BANKS = ("dense", "sparse", "low_rank")


def make_bank(kind: str, vectors: Sequence[TaskVector], *, rank: int = 2, ratio: float = 0.6) -> Experts:
    """Make an expert bank of the given kind."""
    if kind == "dense":
        return DenseExperts.from_task_vectors(vectors)
    if kind == "sparse":
        return SparseExperts.from_task_vectors(vectors, ratio)
    return LowRankExperts.from_task_vectors(vectors, rank, bias_scaling=0.3)


def random_linear(
    in_features: int, out_features: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> nn.Linear:
    """Return a linear layer with random weights that do not depend on the global generator."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(in_features, out_features, dtype=dtype)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return layer


def apply_delta(x: Tensor, delta: LinearDelta, base: nn.Linear) -> Tensor:
    """Apply a base layer and what a bank adds to it, one sample at a time."""
    rows = [min(i, delta.weight.shape[0] - 1) for i in range(x.shape[0])]
    outputs = [
        F.linear(s, base.weight + delta.weight[r], base.bias + delta.bias[r]) for s, r in zip(x, rows, strict=True)
    ]
    return torch.stack(outputs)


def upcycled_toy(
    kind: str = "dense",
    *,
    num_tasks: int = 3,
    depth: int = 1,
    routing: Routing = Routing.SAMPLE,
    selection: Selection | None = None,
    shared: bool = False,
    seed: int = 0,
) -> ToyTower:
    """Return a toy tower whose MLPs are routed; the routers' weights are large enough to tell samples apart."""
    tower, finetuned = toy_states(num_tasks, seed)
    generator = torch.Generator().manual_seed(seed)
    routers: list[Router] = []

    def router(_index: int, width: int, count: int) -> Router:
        if not (shared and routers):
            made = make_router(depth, width, count, 0.3, hidden=width, generator=generator)
            for name, parameter in made.named_parameters():
                if name.endswith("weight"):
                    parameter.data *= 50
            routers.append(made)
        return routers[-1]

    return upcycle_mlps(
        tower,
        tower.state_dict(),
        finetuned,
        make_experts=lambda _path, vectors: make_bank(kind, vectors),
        make_router=router,
        routing=routing,
        selection=selection,
    )


def same_state(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Return whether two states are equal bit for bit, dtypes included."""
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of a state that later changes do not reach."""
    return {name: tensor.detach().clone() for name, tensor in state.items()}


class Killed(BaseException):
    """What stands in tests for the end of the process."""


STEPS = ("rename", "replace", "unlink", "remove", "rmdir", "mkdir", "chmod", "fsync")


@contextmanager
def killed_after(steps: int) -> Iterator[None]:
    """Let so many changes of the file system happen, and none after them; what is written next is half written."""
    left = steps

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return real(*args, **kwargs)

        return step

    def write_text(self: Path, text: str, **kwargs: Any) -> None:
        nonlocal left
        if left == 0:
            Path.open(self, "w").close()  # truncated, and nothing written yet
            raise Killed
        left -= 1
        with self.open("w", encoding="utf-8") as file:
            file.write(text)

    with pytest.MonkeyPatch.context() as patched:
        for name in STEPS:
            patched.setattr(os, name, counted(getattr(os, name)))
        patched.setattr(Path, "write_text", write_text)
        yield


@contextmanager
def nothing_changes(folder: Path) -> Iterator[None]:
    """Check that all under a folder stays as it is."""
    before = contents(folder)
    with killed_after(0):
        yield
    assert contents(folder) == before


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return all files under a folder, and its folders, which hold None."""
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in folder.rglob("*")}
