"""Measure fusion_moe beside the published way, and what each of its parts is worth: rows × pools × seeds, one by one.

Every run is one command of `fusion_merge`, and one line of FILE (JSON) once it is done, so that a measurement that was
broken off goes on where it was. The tables are made of that file.

Usage: python measure.py FILE [--pools tiny8 tiny8_hard tiny20] [--seeds 0 1 2] [--rows NAME …]
       python measure.py FILE --table
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

POOLS = ("tiny8", "tiny8_hard", "tiny20")
SLOW = "method.lr=0.0001 method.max_steps=1000 method.init_lambda=0.3"  # as published, whatever was tuned for the pool
FUSION = "method=fusion_moe"
ROWS = {
    "zero-shot": "method=dummy",
    "fine-tuned": "method=dummy baselines=[fine_tuned]",
    "simple average": "method=simple_average",
    "task arithmetic 0.3": "method=task_arithmetic method.scaling_factor=0.3",
    "task arithmetic 0.05": "method=task_arithmetic method.scaling_factor=0.05",
    "task arithmetic 0.1": "method=task_arithmetic method.scaling_factor=0.1",
    "RankOne-MoE, published": f"method=rankone_moe method.rank_k=32 {SLOW}",
    "WEMoE, published": f"method=wemoe {SLOW}",
    "E-WEMoE, published": f"method=e_wemoe {SLOW}",
    "fusion_moe, 0 steps": f"{FUSION} method.max_steps=0",
    "fusion_moe, 50 steps": f"{FUSION} method.max_steps=50",
    "fusion_moe": FUSION,
    "MLPs alone": f"{FUSION} method.targets=mlp",
    "attention alone": f"{FUSION} method.targets=attention",
    "2 critical layers": f"{FUSION} method.layers=critical:2",
    "start constant": f"{FUSION} method.router_start=constant",
    "start projection": f"{FUSION} method.router_start=projection",
    "start projection, 0 steps": f"{FUSION} method.router_start=projection method.max_steps=0",
    "start constant, 0 steps": f"{FUSION} method.router_start=constant method.max_steps=0",
    "objective entropy": f"{FUSION} method.objective=entropy",
    "objective entropy, guard watches": f"{FUSION} method.objective=entropy method.guard=watch",
    "objective infomax, guard watches": f"{FUSION} method.objective=infomax method.guard=watch",
    "objective tsallis, guard watches": f"{FUSION} method.objective=tsallis method.guard=watch",
    "objective expert_labels + 0.1 infomax": f"{FUSION} method.objective=expert_labels+0.1*infomax",
    "guard watches": f"{FUSION} method.guard=watch",
    "batch routing": f"{FUSION} method.batch_reduce=true method.mixed_tasks=false",
    "tasks apart": f"{FUSION} method.mixed_tasks=false",
    "constant learning rate": f"{FUSION} method.lr_schedule=constant method.warmup_steps=0",
    "AdamW, weight decay 0.01": f"{FUSION} method.optimizer=adamw method.weight_decay=0.01",
    "rank 16": f"{FUSION} method.rank_k=16",
    "routers of two layers": f"{FUSION} method.router_hidden_layers=2",
    "recurrent routers": f"{FUSION} method.router_start=constant method.router_state_width=32",
    "soft top-k, three quarters": f"{FUSION} method.selection=soft_top_k method.select_k=192",
    "top-k, an eighth": f"{FUSION} method.selection=top_k method.select_k=32",
    "top-p 0.9": f"{FUSION} method.selection=top_p",
    "Tsallis top-p": f"{FUSION} method.selection=tsallis_top_p",
    "bounds [0, 1]": f"{FUSION} method.coefficient_bounds=[0,1]",
}
"""What is measured: the arguments of each run beside pool and seed."""


def measured(row: str, pool: str, seed: int) -> dict[str, Any]:
    """Run one command and return what came of it: accuracies in percent, steps and seconds."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*("baselines=[]", f"modelpool={pool}", f"taskpool={pool}", f"seed={seed}"), *ROWS[row].split()]
        command = [sys.executable, "-m", "fusion_merge", *arguments, f"output_dir={folder}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
    scores = report["baselines"]["fine_tuned"] if row == "fine-tuned" else report
    tasks = [task for task, entry in scores.items() if isinstance(entry, dict) and "accuracy" in entry]
    about = report["run"].get("adaptation") or {}
    return {
        **{"row": row, "pool": pool, "seed": seed, "arguments": arguments},
        "accuracy": {task: 100 * scores[task]["accuracy"] for task in tasks if task != "average"},
        "steps": about.get("steps", 0),
        "adaptation_seconds": about.get("seconds", 0.0),
        "seconds": time.perf_counter() - begun,
        "collapsed": about.get("collapsed", {}),
        "interventions": len(about.get("interventions", [])),
    }


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return one table a pool: over seeds the mean, its spread, the worst task, and tasks that are below zero-shot."""
    text = []
    head = ("", "average", "worst task", "tasks below zero-shot", "taken back", "steps", "adaptation, s", "seeds")
    for pool in dict.fromkeys(line["pool"] for line in lines):
        rows: dict[str, list[dict[str, Any]]] = {}
        for line in lines:
            if line["pool"] == pool:
                rows.setdefault(line["row"], []).append(line)
        floor = rows["zero-shot"][0]["accuracy"] if "zero-shot" in rows else {}
        found = [cells(row, sorted(runs, key=lambda run: run["seed"]), floor) for row, runs in rows.items()]
        text += [f"## {pool}", "", tabulate(found, head, tablefmt="github", disable_numparse=True), ""]
    return "\n".join(text)


def cells(row: str, runs: Sequence[dict[str, Any]], floor: dict[str, float]) -> tuple[str, ...]:
    """Return the cells of one row, from its runs with one seed each, and the zero-shot accuracies, if they are known.

    Of the tasks below zero-shot it is the most of any seed.
    """
    averages = [statistics.mean(run["accuracy"].values()) for run in runs]
    spread = f" ± {statistics.stdev(averages):.1f}" if len(averages) > 1 else ""
    worst = min(runs, key=lambda run: min(run["accuracy"].values()))["accuracy"]
    task = min(worst, key=lambda name: worst[name])
    below = [sum(run["accuracy"][name] < least for name, least in floor.items()) for run in runs]
    back = ", ".join(str(run["interventions"]) for run in runs)
    steps, seconds = (statistics.mean(run[key] for run in runs) for key in ("steps", "adaptation_seconds"))
    average, lowest = f"{statistics.mean(averages):.1f}{spread}", f"{task} {worst[task]:.1f}"
    most = str(max(below)) if floor else ""
    return (row, average, lowest, most, back, f"{steps:.0f}", f"{seconds:.0f}", str(len(runs)))


def main() -> None:
    """Measure what is not measured yet, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--pools", nargs="+", choices=POOLS, default=POOLS)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=tuple(ROWS))
    parser.add_argument("--table", action="store_true", help="print the tables of what was measured")
    given = parser.parse_args()
    text = given.file.read_text(encoding="utf-8") if given.file.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    if given.table:
        print(table(lines))
        return
    done = {(line["row"], line["pool"], line["seed"]) for line in lines}
    for seed in given.seeds:
        for row in given.rows:
            for pool in given.pools:
                if (row, pool, seed) in done:
                    continue
                line = measured(row, pool, seed)
                with given.file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                average = statistics.mean(line["accuracy"].values())
                print(f"{pool} seed {seed}, {row}: {average:.1f}, {line['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
