"""Measure time, memory and start-up; each figure stands beside a floor and, where there is one, fusion-bench's.

Real geometry, random weights, float32. What is compared takes turns; figures are medians over turns, ratios medians of
each turn's ratio. All of it takes 10 to 12 minutes on two cores, 8 GB of memory, and 4 GB of disk for a while; --quick
takes less than a minute, on a toy whose figures mean nothing. Results go to OUTPUT as Markdown and JSON.

groups:
  layers      one MLP: methods × routings × passes
  growth      one MLP with 2, 8 and 20 experts
  geometries  one MLP of ViT-B/16 and ViT-L/14
  model       evaluation of whole models
  step        one adaptation step of whole models
  build       making one RankOne-MoE layer
  memory      building whole models, activations, expert banks
  startup     importing, and --help
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.layers import build_rows, geometry_rows, growth_rows, layer_rows, make_layers
from benchmarks.memory import memory_rows
from benchmarks.models import model_rows, step_rows
from benchmarks.report import Row, machine, shown, write
from benchmarks.settings import BATCH, GEOMETRIES, Settings
from benchmarks.startup import startup_rows

GROUPS: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "layers": layer_rows,
    "growth": growth_rows,
    "geometries": geometry_rows,
    "model": model_rows,
    "step": step_rows,
    "build": build_rows,
    "memory": memory_rows,
    "startup": startup_rows,
}


def parse() -> tuple[Settings, list[str]]:
    """Return the settings that the command line asks for, and the groups."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=tuple(GROUPS), metavar="GROUP", help="measure these groups alone")
    parser.add_argument("--quick", action="store_true", help="only show that everything runs: the toy, one thread")
    parser.add_argument("--geometry", choices=tuple(GEOMETRIES), default="vit-b-32", help="the tower [%(default)s]")
    parser.add_argument("--tasks", type=int, default=8, help="experts of an MLP [%(default)s]")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch [%(default)s]")
    parser.add_argument("--seconds", type=float, default=1.0, help="least time for each figure [%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="turns of what is compared; 3 of what is slow [5]")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"), help="folder [%(default)s]")
    given = parser.parse_args()
    if given.quick:
        given.geometry, given.threads, given.seconds, given.rounds = "toy", 1, 0.001, 1
    settings = Settings(
        GEOMETRIES[given.geometry],
        given.tasks,
        given.threads,
        given.seconds,
        given.rounds,
        given.output,
        given.quick,
    )
    return settings, [group for group in GROUPS if given.only is None or group in given.only]


def main() -> None:
    """Measure, print each row as it comes and the tables at the end, and write them beside the raw figures."""
    settings, groups = parse()
    torch.set_num_threads(settings.threads)
    settings.output.mkdir(parents=True, exist_ok=True)
    about = machine(settings.threads)
    described = {"geometry": str(settings.geometry), "experts": settings.tasks, "batch": BATCH, "dtype": "float32"}
    described |= {"rank": settings.geometry.rank, "seconds": settings.seconds, "rounds": settings.rounds}
    some = "" if len(groups) == len(GROUPS) else f"-{'-'.join(groups)}"
    stem = settings.output / f"{settings.geometry.name}-{settings.tasks}{some}"
    rows: list[Row] = []
    text = ""
    for group in groups:
        for row in GROUPS[group](settings):
            rows.append(row)
            print(f"{group}: {row.what}: {shown(row.figures['ours'])} {row.unit}", file=sys.stderr, flush=True)
        make_layers.cache_clear()
        text = write(rows, about, described, stem)  # what is there is kept if the rest fails
    print(text)


if __name__ == "__main__":
    main()
