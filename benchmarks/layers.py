"""Time the routed layers against a plain MLP of the same shape (the floor) and fusion-bench's layers (the reference).

Real geometry, random weights. Every figure is a median in milliseconds; ratios compare within this one run.

Usage: python benchmarks/layers.py [--geometry vit-b-32] [--tasks 8] [--threads 2] [--seconds 1.0] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from transformers.activations import ACT2FN

from fusion_merge.moe import (
    DenseExperts,
    Experts,
    LowRankExperts,
    MoELinear,
    MoEMLP,
    Routing,
    SparseExperts,
    make_router,
)
from fusion_merge.moe.experts import TaskVector

GEOMETRIES = {"vit-b-32": (768, 3072, 50), "vit-b-16": (768, 3072, 197), "vit-l-14": (1024, 4096, 257)}
"""Width, hidden width and tokens of an MLP."""

RANK, PRUNED, LAMBDA, BATCH = 32, 0.9, 0.3, 16
METHODS = ("rankone_moe", "wemoe", "e_wemoe")


class MLP(nn.Module):
    """A plain transformer MLP, as CLIP's."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.activation_fn = ACT2FN["quick_gelu"]
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Apply the MLP: (B, T, D) → (B, T, D)."""
        output: Tensor = self.fc2(self.activation_fn(self.fc1(tokens)))
        return output


def make_mlps(width: int, hidden: int, tasks: int) -> tuple[MLP, list[MLP]]:
    """Make a pretrained MLP and fine-tuned ones whose task vectors have a decaying spectrum, as real ones have."""
    torch.manual_seed(0)
    base = MLP(width, hidden).requires_grad_(False)
    tuned = [copy.deepcopy(base) for _ in range(tasks)]
    decay = torch.logspace(0, -2, 4 * RANK)
    for mlp in tuned:
        for linear in (mlp.fc1, mlp.fc2):
            rows, columns = linear.weight.shape
            leading = torch.randn(rows, 4 * RANK) * decay @ torch.randn(4 * RANK, columns)
            linear.weight += 1e-3 * (leading / 8 + 0.1 * torch.randn(rows, columns))
            linear.bias += 1e-3 * torch.randn(rows)
    return base, tuned


def make_bank(method: str, base: nn.Linear, tuned: list[nn.Linear]) -> Experts:
    """Make the bank of one linear layer."""
    vectors = [TaskVector(t.weight - base.weight, t.bias - base.bias) for t in tuned]
    if method == "wemoe":
        return DenseExperts.from_task_vectors(vectors)
    if method == "e_wemoe":
        return SparseExperts.from_task_vectors(vectors, PRUNED)
    return LowRankExperts.from_task_vectors(vectors, RANK, LAMBDA)


def ours(method: str, base: MLP, tuned: list[MLP], routing: Routing) -> nn.Module:
    """Make our routed MLP."""
    layers = []
    for part in ("fc1", "fc2"):
        linear = copy.deepcopy(getattr(base, part))
        layers.append(MoELinear(linear, make_bank(method, linear, [getattr(t, part) for t in tuned])))
    width, count = base.fc1.in_features, layers[0].experts.num_coefficients
    depth = 1 if method == "rankone_moe" else 2
    router = make_router(depth, width, count, LAMBDA, hidden=width)
    return MoEMLP(layers[0], base.activation_fn, layers[1], router, routing)


def reference(method: str, base: MLP, tuned: list[MLP], routing: Routing) -> nn.Module | None:
    """Make fusion-bench's routed MLP, if that is installed; it changes what it is given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from fusion_bench.models import rankone_moe, sparse_we_moe, we_moe
        except ImportError:
            return None
    own, experts = copy.deepcopy(base).requires_grad_(True), copy.deepcopy(tuned)
    options: dict[str, Any] = {"init_lambda": LAMBDA, "batch_first": True, "batch_reduce": routing is Routing.BATCH}
    width = base.fc1.in_features
    if method == "wemoe":
        made = we_moe.WeightEnsemblingMoE(width, own, experts, router_hidden_layers=2, **options)
    elif method == "e_wemoe":
        made = sparse_we_moe.SparseWeightEnsemblingMoE(
            width, own, experts, router_hidden_layers=2, tv_prune_ratio=PRUNED, **options
        )
    else:
        made = rankone_moe.RankOneMoE(
            width, own, experts, router_hidden_layers=1, rank_k=RANK, svd_accelerator="cpu", **options
        )
    return made  # type: ignore[no-any-return]


def milliseconds(run: Callable[[], object], seconds: float, threads: int) -> float:
    """Return the median time of a call."""
    timer = Timer("run()", globals={"run": run}, num_threads=threads)
    return 1e3 * timer.blocked_autorange(min_run_time=seconds).median


def calls(mlp: nn.Module, tokens: Tensor) -> dict[str, Callable[[], object]]:
    """Return what is timed of a layer: its forward pass, and that with the gradient of its input and router."""
    wanted = tokens.clone().requires_grad_(True)

    def both() -> None:
        mlp(wanted).sum().backward()

    def forward() -> None:
        with torch.no_grad():
            mlp(tokens)

    return {"forward": forward, "forward + backward": both}


def measure(width: int, hidden: int, length: int, tasks: int, seconds: float, threads: int) -> list[dict[str, Any]]:
    """Time every method, routing and pass."""
    base, tuned = make_mlps(width, hidden, tasks)
    tokens = torch.randn(BATCH, length, width)
    floor = {name: milliseconds(call, seconds, threads) for name, call in calls(base, tokens).items()}
    rows = []
    for method in METHODS:
        for routing in Routing:
            own = calls(ours(method, base, tuned, routing), tokens)
            other = reference(method, base, tuned, routing)
            theirs = calls(other, tokens) if other is not None else {}
            for name, call in own.items():
                row: dict[str, Any] = {"method": method, "routing": str(routing), "what": name, "floor": floor[name]}
                row["ours"] = milliseconds(call, seconds, threads)
                row["reference"] = milliseconds(theirs[name], seconds, threads) if name in theirs else None
                rows.append(row)
    return rows


def measure_building(width: int, hidden: int, tasks: int, seconds: float, threads: int) -> dict[str, Any]:
    """Time all decompositions of one layer for RankOne-MoE."""
    base, tuned = make_mlps(width, hidden, tasks)

    def build() -> None:
        for part in ("fc1", "fc2"):
            make_bank("rankone_moe", getattr(base, part), [getattr(t, part) for t in tuned])

    def grams() -> None:
        for mlp in tuned:
            for weight in (mlp.fc1.weight, mlp.fc2.weight.T):
                torch.mm(weight.T, weight)

    def whole() -> None:
        reference("rankone_moe", base, tuned, Routing.SAMPLE)

    row: dict[str, Any] = {"method": "rankone_moe", "routing": "", "what": f"building, rank {RANK}"}
    row["floor"] = milliseconds(grams, seconds, threads)
    row["ours"] = milliseconds(build, seconds, threads)
    known = reference("rankone_moe", base, tuned[:1], Routing.SAMPLE) is not None
    row["reference"] = milliseconds(whole, 0.0, threads) if known else None
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Return the figures as a Markdown table, with their ratios."""
    header = ["method", "routing", "what", "floor, ms", "ours, ms", "reference, ms", "ours / floor", "reference / ours"]
    body = []
    for row in rows:
        theirs = row["reference"]
        shown = (f"{theirs:.1f}", f"{theirs / row['ours']:.1f}") if theirs is not None else ("", "")
        figures = [f"{row['floor']:.1f}", f"{row['ours']:.1f}", shown[0], f"{row['ours'] / row['floor']:.2f}", shown[1]]
        body.append([row["method"], row["routing"], row["what"], *figures])
    return tabulate(body, headers=header, tablefmt="github", disable_numparse=True)


def main() -> None:
    """Measure, print the table, and write it beside the raw figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=tuple(GEOMETRIES), default="vit-b-32")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0, help="least time for each figure")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    width, hidden, length = GEOMETRIES[given.geometry]
    rows = measure(width, hidden, length, given.tasks, given.seconds, given.threads)
    rows.append(measure_building(width, hidden, given.tasks, given.seconds, given.threads))
    shape = f"{width} → {hidden}, {length} tokens, batch {BATCH}, {given.tasks} experts, float32"
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": given.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "geometry": f"{given.geometry}: {shape}",
    }
    given.output.mkdir(parents=True, exist_ok=True)
    name = f"layers-{given.geometry}-{given.tasks}"
    (given.output / f"{name}.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=2))
    text = "\n".join([", ".join(f"{k} {v}" for k, v in machine.items()), "", table(rows), ""])
    (given.output / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
