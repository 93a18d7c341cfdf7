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

_STACK = 4
"""From so many points on, labels of points above one another stand in a column."""

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
    inside: Box = (axis.bbox.x0, axis.bbox.y0, axis.bbox.x1, axis.bbox.y1)
    pixels: list[tuple[float, float]] = [tuple(axis.transData.transform(point)) for point in points]
    radius = 5 * figure.dpi / 72
    taken: list[Box] = [(x - radius, y - radius, x + radius, y + radius) for x, y in pixels]
    texts = [_annotation(axis, label, point, font) for label, point in zip(labels, points, strict=True)]
    drawn = [text.get_window_extent(figure.canvas.get_renderer()) for text in texts]
    sizes = [(box.width, box.height) for box in drawn]
    places: dict[int, tuple[float, float]] = {}
    for stack in _stacks(pixels, radius, max((height for _, height in sizes), default=0.0)):
        column = _column(stack, pixels, sizes, radius, taken, inside)
        places |= column
        taken += [_box(column[index], sizes[index]) for index in column]
    for index in sorted(range(len(points)), key=lambda i: -pixels[i][1]):
        if index not in places:
            places[index] = _place(*pixels[index], *sizes[index], radius, taken, inside)
            taken.append(_box(places[index], sizes[index]))
    for index, (left, bottom) in places.items():
        (x, y), (width, height) = pixels[index], sizes[index]
        texts[index].set_position((left - x, bottom + height / 2 - y))
        beside = min(abs(left - x - radius), abs(left + width + radius - x)) < 1.5 * radius
        if beside and abs(bottom + height / 2 - y) < height:
            texts[index].arrow_patch.set_visible(False)


def _annotation(axis: Any, label: str, point: tuple[float, float], font: float) -> Any:
    """Return a label with a line to its point; its place is still to be set."""
    line = {"arrowstyle": "-", "color": "0.4", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)}
    return axis.annotate(
        label, point, xytext=(0, 0), textcoords="offset pixels", fontsize=font, va="center", arrowprops=line
    )


def _stacks(pixels: Sequence[tuple[float, float]], radius: float, height: float) -> list[list[int]]:
    """Return groups of at least four points above one another, too close for a label beside each; highest first."""
    stacks: list[list[int]] = []
    for index in sorted(range(len(pixels)), key=lambda i: (round(pixels[i][0] / (2 * radius)), -pixels[i][1])):
        x, y = pixels[index]
        above = pixels[stacks[-1][-1]] if stacks else (math.inf, math.inf)
        if abs(above[0] - x) <= 2 * radius and above[1] - y < 1.2 * height:
            stacks[-1].append(index)
        else:
            stacks.append([index])
    return [stack for stack in stacks if len(stack) >= _STACK]


def _column(
    stack: Sequence[int],
    pixels: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    radius: float,
    taken: Sequence[Box],
    inside: Box,
) -> dict[int, tuple[float, float]]:
    """Return the left lower corners of labels in a column to the right of a stack, in its order; none without room."""
    step = 1.1 * max(sizes[index][1] for index in stack)
    middle = sum(pixels[index][1] for index in stack) / len(stack)
    middle = min(max(middle, inside[1] + step * len(stack) / 2), inside[3] - step * len(stack) / 2)
    right = max(pixels[index][0] for index in stack)
    for distance in (4, 6, 9, 13):
        bottoms = [middle + step * (len(stack) / 2 - row - 1) for row in range(len(stack))]
        found = {index: (right + distance * radius, bottom) for index, bottom in zip(stack, bottoms, strict=True)}
        boxes = [_box(found[index], sizes[index]) for index in stack]
        if all(_within(box, inside) and not any(_overlap(box, other) for other in taken) for box in boxes):
            return found
    return {}


def _box(corner: tuple[float, float], size: tuple[float, float]) -> Box:
    return (corner[0], corner[1], corner[0] + size[0], corner[1] + size[1])


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
