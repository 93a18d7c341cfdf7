"""What is measured: geometries, methods, and the settings of one run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import CLIPVisionConfig

METHODS = {"rankone_moe": "RankOne-MoE", "wemoe": "WEMoE", "e_wemoe": "E-WEMoE 90 %"}
PRUNED, LAMBDA, BATCH, CLASSES = 0.9, 0.3, 16, 100


@dataclass(frozen=True)
class Geometry:
    """The shape of a CLIP vision tower.

    Attributes:
        name: how it is called.
        width: D.
        hidden: the width inside of an MLP.
        layers: how many MLPs.
        heads: of the attention.
        image: pixels a side.
        patch: pixels a side.
        rank: rank-one experts a task.
    """

    name: str
    width: int
    hidden: int
    layers: int
    heads: int
    image: int
    patch: int
    rank: int = 32

    @property
    def tokens(self) -> int:
        """How many tokens an image becomes."""
        return (self.image // self.patch) ** 2 + 1

    def config(self) -> CLIPVisionConfig:
        """Return the configuration of such a tower."""
        return CLIPVisionConfig(
            hidden_size=self.width,
            intermediate_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            image_size=self.image,
            patch_size=self.patch,
        )

    def __str__(self) -> str:
        return f"{self.name} ({self.layers} layers, {self.width} → {self.hidden}, {self.tokens} tokens)"


GEOMETRIES = {
    g.name: g
    for g in (
        Geometry("vit-b-32", 768, 3072, 12, 12, 224, 32),
        Geometry("vit-b-16", 768, 3072, 12, 12, 224, 16),
        Geometry("vit-l-14", 1024, 4096, 24, 16, 224, 14),
        Geometry("toy", 16, 24, 2, 2, 16, 8, rank=4),
        Geometry("toy-fine", 16, 24, 2, 2, 16, 4, rank=4),
    )
}
"""Real ones, and toys whose figures mean nothing."""


@dataclass(frozen=True)
class Settings:
    """The settings of one run.

    Attributes:
        geometry: the tower.
        tasks: N, the experts of an MLP.
        threads: of PyTorch.
        seconds: the least time that each figure is measured for.
        rounds: how often what is compared takes turns.
        output: where results go, and files that are needed for a while.
        quick: only show that everything runs.
    """

    geometry: Geometry
    tasks: int = 8
    threads: int = 2
    seconds: float = 1.0
    rounds: int = 5
    output: Path = Path("outputs/benchmarks")
    quick: bool = False

    @property
    def others(self) -> tuple[Geometry, ...]:
        """The geometries that one layer is timed in besides."""
        names = ("toy-fine",) if self.geometry.name.startswith("toy") else ("vit-b-16", "vit-l-14")
        return tuple(GEOMETRIES[name] for name in names if name != self.geometry.name)

    @property
    def growth(self) -> tuple[int, ...]:
        """How many experts there are where growth is shown."""
        return tuple(sorted({2, self.tasks, 20}))
