"""Pictures of a run; they need the extra `plot` (matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fusion_merge.files import atomic


def loss_curve(path: Path, entropy: Mapping[str, Sequence[float]]) -> None:
    """Draw the entropy of each task over the adaptation steps, smoothed, and their mean.

    Args:
        path: the picture's file.
        entropy: for each task, the entropy of each step, in nats.
    """
    import numpy as np

    figure, axis = _figure((7.0, 4.0))
    colours = _colours(len(entropy))
    smooth = {name: _smooth(np.asarray(values)) for name, values in entropy.items()}
    for (name, values), colour in zip(smooth.items(), colours, strict=True):
        axis.plot(values, color=colour, linewidth=1.2, label=name)
    mean = np.mean(list(smooth.values()), axis=0)
    axis.plot(mean, color="black", linewidth=2.5, label="mean")
    axis.set(xlabel="adaptation step", ylabel="entropy of predictions (nats)", ylim=(0, None))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def routing_picture(path: Path, weights: Mapping[str, Tensor], experts: Sequence[str], *, title: str = "") -> None:
    """Draw which experts each task's images call for: over all layers, and the own expert layer by layer.

    Both parts share one scale of colours, which covers at least 0 to 1, so that small differences stay pale.

    Args:
        path: the picture's file.
        weights: for each task, the mean coefficients (L, N).
        experts: the N tasks whose experts they are.
        title: what made the model, in words.
    """
    import numpy as np

    tasks = list(weights)
    overall = np.stack([weights[task].mean(dim=0).numpy() for task in tasks])  # (tasks, N)
    known = [task for task in tasks if task in experts]
    own = np.stack([weights[task][:, list(experts).index(task)].numpy() for task in known]) if known else None
    columns = [overall.shape[1], own.shape[1]] if own is not None else [overall.shape[1]]
    figure, axes = _figure((2.2 + 0.55 * sum(columns), 1.6 + 0.42 * len(tasks)), len(columns), columns)
    axes = list(np.atleast_1d(axes))
    shown = [overall] if own is None else [overall, own]
    limits = min(0.0, *(part.min() for part in shown)), max(1.0, *(part.max() for part in shown))
    image = _heatmap(axes[0], overall, tasks, list(experts), "mean over layers", limits)
    axes[0].set(xlabel="expert", ylabel="images of task")
    if own is not None:
        _heatmap(axes[1], own, known, [str(i) for i in range(own.shape[1])], "the task's own expert", limits)
        axes[1].set(xlabel="layer", yticks=[])
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(f"merging coefficients, {title}" if title else "merging coefficients", fontsize=11)
    _save(figure, path)


def _heatmap(
    axis: Any, values: Any, rows: Sequence[str], columns: Sequence[str], title: str, limits: tuple[float, float]
) -> Any:
    image = axis.imshow(values, cmap="cividis", aspect="auto", vmin=limits[0], vmax=limits[1])
    axis.set_title(title, fontsize=9)
    axis.set_xticks(
        range(len(columns)),
        columns,
        rotation=45 if max(map(len, columns)) > 2 else 0,
        ha="center",
        fontsize=8,
    )
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    middle = sum(limits) / 2
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            colour = "black" if value > middle else "white"
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7)
    return image


def _figure(size: tuple[float, float], columns: int = 1, widths: Sequence[int] | None = None) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, gridspec_kw={"width_ratios": list(widths)} if widths else None)
    return figure, axes


def _colours(count: int) -> list[Any]:
    """Return distinct colours that colour-blind readers can tell apart."""
    from matplotlib import colormaps

    safe = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999933", "#882255"]
    if count <= len(safe):
        return safe[:count]
    return [colormaps["viridis"](i / (count - 1)) for i in range(count)]


def _smooth(values: Any) -> Any:
    import numpy as np

    window = max(1, len(values) // 50)
    return np.convolve(np.pad(values, (window - 1, 0), mode="edge"), np.ones(window) / window, mode="valid")


def _save(figure: Any, path: Path) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")
