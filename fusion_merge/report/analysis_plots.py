"""The pictures of `fusion_merge analyse`; they need the extra `plot` (matplotlib)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from fusion_merge.models.parameters import PARTS, Magnitudes, Moved, bin_edges
from fusion_merge.report.comparison import Row
from fusion_merge.report.drawing import LINES, MARKERS, colours, heatmap, new_figure, plain_axis, save_figure

_WIDTH = 7.0
"""Inches; about 700 pixels in a README."""

_NAMED = 8
"""So many experts have their names below each of several matrices; more are numbered."""


def layers_picture(
    path: Path, weights: Mapping[str, Tensor], experts: Sequence[str], *, blocks: Sequence[str], title: str
) -> None:
    """Draw the mean merging coefficients of each layer: one matrix task × expert a layer, on one scale of colours.

    Args:
        path: the picture's file.
        weights: for each task, the mean coefficients (L, N).
        experts: the N tasks whose experts they are.
        blocks: the names of the L routed blocks.
        title: what made the model, in words.
    """
    import numpy as np

    tasks = list(weights)
    values = np.stack([weights[task].numpy() for task in tasks], axis=1)  # (L, tasks, N)
    few = len(values) <= 4  # the values can be read then
    columns = min(len(values), 2 if few else 4 if len(experts) <= _NAMED else 3)
    rows = math.ceil(len(values) / columns)
    height = 1.3 + rows * (0.5 + (0.24 if few else 0.17) * len(tasks))
    figure, axes = new_figure((_WIDTH, height), rows, columns, sharex=True, sharey=True)
    limits = min(0.0, float(values.min())), max(1.0, float(values.max()))
    if len(experts) > _NAMED:  # names would not fit below one another's columns
        numbers = {name: str(number) for number, name in enumerate(experts, start=1)}
        tasks, experts = [f"{task}  {numbers.get(task, '')}".rstrip() for task in tasks], list(numbers.values())
    for axis, layer, matrix in zip(axes, blocks, values, strict=False):
        image = heatmap(
            axis, matrix, tasks, experts, f"layer {layer}", limits, font=8 if few else 7, digits=1 if few else None
        )
        if len(experts) > _NAMED:
            axis.tick_params(axis="x", labelrotation=90)
    for axis in axes[len(values) :]:
        axis.set_visible(False)
    figure.supxlabel("expert", fontsize=9)
    figure.supylabel("images of task", fontsize=9)
    figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02).ax.tick_params(labelsize=8)
    figure.suptitle(f"merging coefficients by layer, {title}", fontsize=10)
    save_figure(figure, path)


def first_choice_picture(path: Path, shares: Mapping[str, Tensor], experts: Sequence[str], *, title: str) -> None:
    """Draw the share of each task's images whose largest coefficient is each task's expert, the mean over layers.

    Args:
        path: the picture's file.
        shares: for each task, the shares (L, N).
        experts: the N tasks whose experts they are.
        title: what made the model, in words.
    """
    import numpy as np

    tasks = list(shares)
    matrix = 100 * np.stack([shares[task].mean(dim=0).numpy() for task in tasks])  # (tasks, N), percent
    figure, (axis,) = new_figure((_WIDTH, 1.6 + 0.4 * len(tasks)))
    image = heatmap(axis, matrix, tasks, experts, f"first choice, {title}", (0.0, 100.0), font=9, digits=0)
    axis.set_xlabel("expert with the largest coefficient", fontsize=9)
    axis.set_ylabel("images of task", fontsize=9)
    bar = figure.colorbar(image, ax=axis, fraction=0.04, pad=0.02)
    bar.set_label("images, %, mean over layers", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    save_figure(figure, path)


def variation_picture(path: Path, found: Mapping[str, Mapping[tuple[int | None, str], Moved]]) -> None:
    """Draw how far MLP, attention and the rest of each layer moved: each task, and the mean.

    Args:
        path: the picture's file.
        found: for each task, what `variation` returned.
    """
    figure, axes = new_figure((_WIDTH, 3.6), columns=2)
    layers = sorted({layer for moved in found.values() for layer, _ in moved if layer is not None})
    looks = zip(PARTS, MARKERS, LINES, colours(len(PARTS)), strict=False)
    for part, marker, line, colour in looks:
        for axis, measure in zip(axes, ("distance", "cosine"), strict=True):
            curves = [[getattr(moved[layer, part], measure) for layer in layers] for moved in found.values()]
            for curve in curves:
                axis.plot(layers, curve, color=colour, alpha=0.35, linewidth=0.8, linestyle=line)
            mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
            label = {"mlp": "MLP", "rest": "rest (layer norms)"}.get(part, part)
            axis.plot(layers, mean, color=colour, marker=marker, linestyle=line, linewidth=2.2, label=label)
    axes[0].set_ylabel("L2 distance to pretrained", fontsize=9)
    axes[1].set_ylabel("cosine similarity to pretrained", fontsize=9)
    axes[0].set_ylim(0, None)
    for axis in axes:
        axis.set_xlabel("layer", fontsize=9)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.tick_params(labelsize=8)
        axis.ticklabel_format(axis="y", useOffset=False)
        plain_axis(axis)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(PARTS), frameon=False, fontsize=9)
    figure.supxlabel(f"thin: each of {len(found)} tasks; thick: their mean", fontsize=8)
    save_figure(figure, path)


def magnitudes_picture(path: Path, found: Mapping[str, Magnitudes]) -> None:
    """Draw the histogram of the magnitudes of each task vector's entries, and where 90 % of them end.

    Args:
        path: the picture's file.
        found: for each task, its histogram.
    """
    edges = bin_edges()
    used = [i for m in found.values() for i, count in enumerate(m.counts) if count > 1e-4 * m.total]
    figure, (axis,) = new_figure((_WIDTH, 4.0))
    for index, ((task, m), colour) in enumerate(zip(found.items(), colours(len(found)), strict=True)):
        shares = [100 * count / m.total for count in m.counts]
        label = task if not m.zeros else f"{task} ({100 * m.zeros / m.total:.1f} % zeros)"
        line = LINES[index % len(LINES)]
        middles = [math.sqrt(a * b) for a, b in pairwise(edges)]
        axis.plot(middles, shares, color=colour, linestyle=line, linewidth=1.4, label=label)
    axis.set_xscale("log")
    if used:
        axis.set_xlim(edges[min(used)], edges[max(used) + 1])
    quantiles = [m.quantile(0.9) for m in found.values() if m.quantile(0.9) > 0]
    if quantiles:
        axis.axvspan(min(quantiles) / 10**0.05, max(quantiles), color="0.85", zorder=0)
        top = axis.get_ylim()[1]
        axis.text(max(quantiles) * 1.1, 0.96 * top, "90 % of the entries\nare smaller", fontsize=8, va="top")
    axis.set_ylim(0, None)
    axis.set_xlabel("magnitude of a task vector's entry (log scale)", fontsize=9)
    axis.set_ylabel("entries, % (ten bins a decade)", fontsize=9)
    axis.tick_params(labelsize=8)
    plain_axis(axis)
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    save_figure(figure, path)


def sweep_picture(
    path: Path,
    values: Sequence[float],
    rows: Sequence[Row],
    tasks: Sequence[str],
    *,
    label: str,
    energies: Sequence[float] | None = None,
) -> None:
    """Draw accuracy over the values of an option, and over size; where there are energies, those instead of size.

    Args:
        path: the picture's file.
        values: the option's values.
        rows: what came of each.
        tasks: the tasks.
        label: what the option is called.
        energies: for each value, the explained energy in 0-1.
    """
    figure, axes = new_figure((_WIDTH, 4.0), columns=2, sharey=energies is None)
    places = list(range(len(values)))
    own = [row.megabytes or 0.0 for row in rows]
    over: list[tuple[Any, Sequence[float]]] = [(axes[0], places)] + ([(axes[1], own)] if energies is None else [])
    for axis, xs in over:
        for index, (task, colour) in enumerate(zip(tasks, colours(len(tasks)), strict=True)):
            scores = [100 * row.accuracies.get(task, math.nan) for row in rows]
            axis.plot(xs, scores, color=colour, linestyle=LINES[index % len(LINES)], linewidth=1.1, label=task)
        averages = [math.nan if (a := row.average(tasks)) is None else 100 * a for row in rows]
        axis.plot(xs, averages, color="black", marker="o", linewidth=2.4, label="average")
        axis.set_ylabel("accuracy, %" if axis is axes[0] else "", fontsize=9)
    axes[0].set_xticks(places, [f"{value:g}" if value != -1 else "full" for value in values])
    axes[0].set_xlabel(label, fontsize=9)
    if energies is None:
        axes[1].set_xlabel("size on disk, MB", fontsize=9)
    else:
        shown = [100 * energy for energy in energies]
        axes[1].plot(places, shown, color="black", marker="s", linewidth=2.0)
        for x, y in zip(places, shown, strict=True):
            axes[1].annotate(f"{y:.0f}", (x, y), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8)
        axes[1].set_xticks(places, [f"{value:g}" if value != -1 else "full" for value in values])
        axes[1].set_xlabel(label, fontsize=9)
        axes[1].set_ylabel("explained energy of MLP task vectors, %", fontsize=9)
        axes[1].set_ylim(0, 109)
    for axis in axes:
        axis.tick_params(labelsize=8)
        plain_axis(axis)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    save_figure(figure, path)
