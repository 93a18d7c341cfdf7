"""What the pictures share: figures, colours that colour-blind readers can tell apart, heatmaps, labels of points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusion_merge.files import atomic

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)), (0, (3, 1)))
"""Styles that tell lines apart where colours do not."""

_SAFE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999933", "#882255")

_MANY = 100
"""Cells of a heatmap that can still be read with their values in them."""

Box = tuple[float, float, float, float]
"""Left, bottom, right and top, in pixels."""


def new_figure(
    size: tuple[float, float], rows: int = 1, columns: int = 1, widths: Sequence[float] | None = None, **options: Any
) -> tuple[Any, list[Any]]:
    """Return a figure and its axes, row by row.

    Args:
        size: width and height in inches, of 150 pixels.
        rows: rows of axes.
        columns: columns of axes.
        widths: the columns' relative widths.
        **options: further ones of matplotlib's `Figure.subplots`, such as `sharey`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    ratios = {"width_ratios": list(widths)} if widths else None
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw=ratios, **options)
    return figure, list(axes.flat)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as PNG, whole or not at all.

    Args:
        figure: what `new_figure` returned.
        path: the picture's file.
    """
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")


def colours(count: int) -> list[Any]:
    """Return distinct colours that colour-blind readers can tell apart.

    Args:
        count: how many.
    """
    from matplotlib import colormaps

    if count <= len(_SAFE):
        return list(_SAFE[:count])
    return [colormaps["viridis"](i / (count - 1)) for i in range(count)]


def plain_axis(axis: Any) -> None:
    """Take away the frame's upper and right lines.

    Args:
        axis: the axes.
    """
    axis.spines[["top", "right"]].set_visible(False)


def heatmap(
    axis: Any,
    values: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    limits: tuple[float, float],
    *,
    font: float = 8,
    digits: int | None = 2,
) -> Any:
    """Draw a matrix in colours, with its values in the cells where there is room; return the image.

    Args:
        axis: where.
        values: the matrix.
        rows: the rows' names.
        columns: the columns' names.
        title: what it is of.
        limits: the lowest and the highest value of the scale.
        font: the size of names; that of values is one less.
        digits: decimals of the values; None leaves them out.
    """
    image = axis.imshow(values, cmap="cividis", aspect="auto", vmin=limits[0], vmax=limits[1])
    axis.set_title(title, fontsize=font + 1)
    turned = max(map(len, columns)) > 2
    axis.set_xticks(
        range(len(columns)),
        columns,
        rotation=45 if turned else 0,
        ha="right" if turned else "center",
        rotation_mode="anchor" if turned else "default",
        fontsize=font,
    )
    axis.set_yticks(range(len(rows)), rows, fontsize=font)
    if values.size > _MANY or digits is None:
        return image
    middle = sum(limits) / 2
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            colour = "black" if value > middle else "white"
            shown = f"{round(float(value), digits) + 0.0:.{digits}f}"  # no -0.0
            axis.text(j, i, shown, ha="center", va="center", color=colour, fontsize=font - 1)
    return image


def label_points(axis: Any, points: Sequence[tuple[float, float]], labels: Sequence[str], *, font: float = 8) -> None:
    """Write a label beside each point, so that none covers another or a point; one that had to move has a line.

    Limits and size of the axes must be final.

    Args:
        axis: the axes.
        points: x and y of each point.
        labels: the points' labels.
        font: the size of the labels.
    """
    figure = axis.figure
    figure.canvas.draw()  # lays out
    scale = figure.dpi / 72
    inside: Box = (axis.bbox.x0, axis.bbox.y0, axis.bbox.x1, axis.bbox.y1)
    pixels = [tuple(axis.transData.transform(point)) for point in points]
    radius = 5 * scale
    taken: list[Box] = [(x - radius, y - radius, x + radius, y + radius) for x, y in pixels]
    for index in sorted(range(len(points)), key=lambda i: -pixels[i][1]):
        text = axis.annotate(
            labels[index],
            points[index],
            xytext=(0, 0),
            textcoords="offset pixels",
            fontsize=font,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "0.4", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
        )
        box = text.get_window_extent(figure.canvas.get_renderer())
        width, height = box.width, box.height
        x, y = pixels[index]
        moved = _place(x, y, width, height, radius, taken, inside)
        taken.append((moved[0], moved[1], moved[0] + width, moved[1] + height))
        text.set_position((moved[0] - x, moved[1] + height / 2 - y))
        beside = min(abs(moved[0] - x - radius), abs(moved[0] + width + radius - x)) < 1.5 * radius
        if beside and abs(moved[1] + height / 2 - y) < height:
            text.arrow_patch.set_visible(False)


def _place(
    x: float, y: float, width: float, height: float, radius: float, taken: Sequence[Box], inside: Box
) -> tuple[float, float]:
    """Return the left lower corner of the nearest free place; where there is none, that to the right of the point."""
    gap = radius + 2
    heights = [0.0] + [sign * step * height * 0.5 for step in range(1, 40) for sign in (1, -1)]
    sides = [gap, -gap - width, 3 * gap, -3 * gap - width, 6 * gap, -6 * gap - width, -width / 2]
    candidates = [(x + side, y - height / 2 + up) for side, up in itertools.product(sides, heights)]
    candidates.sort(key=lambda c: math.hypot(max(c[0] - x, x - c[0] - width, 0.0), (c[1] + height / 2 - y) * 1.2))
    for left, bottom in candidates:
        box = (left - 1, bottom - 1, left + width + 1, bottom + height + 1)
        if _within(box, inside) and not any(_overlap(box, other) for other in taken):
            return left, bottom
    return candidates[0]


def _within(box: Box, outer: Box) -> bool:
    return box[0] >= outer[0] and box[1] >= outer[1] and box[2] <= outer[2] and box[3] <= outer[3]


def _overlap(box: Box, other: Box) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
