"""Pictures of a run; they need the extra `plot` (matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fusion_merge.report.drawing import LINES, colours, heatmap, new_figure, plain_axis, save_figure


def loss_curve(
    path: Path,
    losses: Mapping[str, Sequence[float]],
    measure: str = "entropy",
    *,
    taken_back: Sequence[tuple[int, str]] = (),
) -> None:
    """Draw the entropy, or other loss, of each task over the adaptation steps, smoothed, and their mean.

    Args:
        path: the picture's file.
        losses: for each task, that of each step.
        measure: what it is: `entropy`, in nats, or the `loss` of another objective.
        taken_back: the steps at which a guard put earlier parameters back, and for which tasks.
    """
    import numpy as np

    figure, (axis,) = new_figure((7.0, 4.0))
    smooth = {name: _smooth(np.asarray(values)) for name, values in losses.items()}
    coloured = dict(zip(losses, colours(len(losses)), strict=True))
    for index, (name, values) in enumerate(smooth.items()):
        axis.plot(values, color=coloured[name], linewidth=1.2, linestyle=LINES[index % len(LINES)], label=name)
    for number, (step, task) in enumerate(taken_back):
        axis.axvline(step, color=coloured[task], linewidth=1.0, linestyle=":", label="taken back" if not number else "")
    mean = np.mean(list(smooth.values()), axis=0)
    axis.plot(mean, color="black", linewidth=2.5, label="mean")
    label = "entropy of predictions (nats)" if measure == "entropy" else measure
    axis.set(xlabel="adaptation step", ylabel=label)
    axis.set_ylim(min(0.0, axis.get_ylim()[0]) if measure == "loss" else 0, None)
    axis.xaxis.get_major_locator().set_params(integer=True)
    plain_axis(axis)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(figure, path)


def routing_picture(
    path: Path, weights: Mapping[str, Tensor], experts: Sequence[str], *, blocks: Sequence[str] = (), title: str = ""
) -> None:
    """Draw which experts each task's images call for: over all layers, and the own expert layer by layer.

    Both parts share one scale of colours, which covers at least 0 to 1, so that small differences stay pale.

    Args:
        path: the picture's file.
        weights: for each task, the mean coefficients (L, N).
        experts: the N tasks whose experts they are.
        blocks: the names of the L routed blocks; numbers from 0 by default.
        title: what made the model, in words.
    """
    import numpy as np

    tasks = list(weights)
    overall = np.stack([weights[task].mean(dim=0).numpy() for task in tasks])  # (tasks, N)
    known = [task for task in tasks if task in experts]
    own = np.stack([weights[task][:, list(experts).index(task)].numpy() for task in known]) if known else None
    columns = [overall.shape[1], own.shape[1]] if own is not None else [overall.shape[1]]
    size = 2.2 + 0.55 * sum(columns), 1.6 + 0.42 * len(tasks)
    figure, axes = new_figure(size, columns=len(columns), widths=columns)
    shown = [overall] if own is None else [overall, own]
    limits = min(0.0, *(part.min() for part in shown)), max(1.0, *(part.max() for part in shown))
    image = heatmap(axes[0], overall, tasks, list(experts), "mean over layers", limits)
    axes[0].set(xlabel="expert", ylabel="images of task")
    if own is not None:
        names = list(blocks) or [str(i) for i in range(own.shape[1])]
        heatmap(axes[1], own, known, names, "the task's own expert", limits)
        axes[1].set(xlabel="layer", yticks=[])
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(f"merging coefficients, {title}" if title else "merging coefficients", fontsize=11)
    save_figure(figure, path)


def _smooth(values: Any) -> Any:
    import numpy as np

    window = max(1, len(values) // 50)
    return np.convolve(np.pad(values, (window - 1, 0), mode="edge"), np.ones(window) / window, mode="valid")
