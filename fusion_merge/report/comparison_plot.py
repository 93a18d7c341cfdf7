"""The picture of a comparison: accuracy against size on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fusion_merge.report.comparison import KINDS, Row
from fusion_merge.report.drawing import MARKERS, colours, label_points, new_figure, plain_axis, save_figure

_CALLED = {"baseline": "baseline", "static": "one static tower", "routed": "routed", "other": "several towers"}


def comparison_picture(path: Path, rows: Sequence[Row], tasks: Sequence[str]) -> None:
    """Draw each method's average accuracy over its size on disk; kinds of methods have markers of their own.

    Args:
        path: the picture's file.
        rows: the methods; those without an average or a size are left out.
        tasks: the tasks that are averaged over.
    """
    averages = [row.average(tasks) for row in rows]
    shown = [
        (row, row.megabytes, 100 * a) for row, a in zip(rows, averages, strict=True) if a is not None and row.megabytes
    ]
    figure, (axis,) = new_figure((7.0, 4.6))
    looks = dict(zip(KINDS, zip(MARKERS, colours(len(KINDS)), strict=False), strict=True))
    for kind, (marker, colour) in looks.items():
        points = [(x, y) for row, x, y in shown if row.kind == kind]
        if points:
            empty = kind == "baseline"
            axis.plot(
                *zip(*points, strict=True),
                linestyle="none",
                marker=marker,
                markersize=7 if empty else 8.5,
                color=colour,
                markerfacecolor="none" if empty else colour,
                zorder=3 if empty else 2,  # what lies below a ring can be seen
                markeredgecolor=colour if empty else "white",  # tells points apart that lie on one another
                markeredgewidth=1.5 if empty else 0.8,
                label=_CALLED[kind],
            )
    axis.set_xscale("log")
    sizes, heights = [x for _, x, _ in shown], [y for _, _, y in shown]
    axis.set_xlim(min(sizes) / 1.6, max(sizes) * 2.2)
    margin = max(0.08 * (max(heights) - min(heights)), 1.0)
    axis.set_ylim(min(heights) - margin, max(heights) + margin)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
    axis.tick_params(which="both", labelsize=9)
    axis.set_xlabel("size on disk, MB (log scale)", fontsize=10)
    axis.set_ylabel(f"average accuracy over {len(tasks)} tasks, %", fontsize=10)
    axis.grid(visible=True, which="major", color="0.9", linewidth=0.7)
    axis.set_axisbelow(True)
    plain_axis(axis)
    figure.legend(loc="outside upper center", ncols=len(KINDS), frameon=False, fontsize=9)
    label_points(axis, [(x, y) for _, x, y in shown], [row.name for row, _, _ in shown], font=9)
    save_figure(figure, path)
