"""More small pictures: polygons, shades, textures, colours, clocks and places.

Every function takes what it draws, the random generator it draws from, and the colours of ink and paper; it returns one
RGB image of `SIZE` × `SIZE` pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi, sin
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion_merge.zoo.drawing import CANVAS, SIZE, Colours, paint, reduced, regular

if TYPE_CHECKING:
    from PIL.Image import Image

    Array = np.ndarray[Any, Any]


def polygon(corners: int, rng: np.random.Generator, ink: Colours, paper: Colours) -> Image:
    """Draw the outline of a regular polygon in a random size, place and thickness.

    Args:
        corners: how many, at least 3.
        rng: source of randomness.
        ink: colours of the outline.
        paper: colours of the background.
    """
    from PIL import Image, ImageDraw

    mask = Image.new("L", (CANVAS, CANVAS), 0)
    radius, turn = rng.uniform(22, 28), rng.uniform(-0.12, 0.12)
    x, y = (CANVAS / 2 + rng.uniform(-3, 3) for _ in range(2))
    points = [(x + radius * px, y + radius * py) for px, py in regular(corners, turn=turn)]
    closed = [*points, points[0], points[1]]  # past the beginning, so that every corner is joined
    ImageDraw.Draw(mask).line(closed, fill=255, width=int(rng.integers(5, 9)), joint="curve")
    return paint(reduced(mask), rng, ink, paper)


def shade(kind: str, rng: np.random.Generator, ink: Colours, paper: Colours) -> Image:
    """Draw a smooth passage from one colour to another.

    Args:
        kind: a key of `SHADES`.
        rng: source of randomness.
        ink: colours at one end.
        paper: colours at the other.
    """
    x, y = _plane(rng.uniform(-0.15, 0.15), rng.uniform(-0.15, 0.15))
    field = SHADES[kind](x, y)  # (SIZE, SIZE)
    field = (field - field.min()) / (field.max() - field.min())
    return paint(field ** rng.uniform(0.7, 1.4), rng, ink, paper, noise=6.0)


def texture(kind: str, rng: np.random.Generator, ink: Colours, paper: Colours) -> Image:
    """Draw a texture in a random scale and position.

    Args:
        kind: a key of `TEXTURES`.
        rng: source of randomness.
        ink: colours of its one half.
        paper: colours of the other.
    """
    period = rng.uniform(7, 10)
    x, y = (axis / period + rng.uniform(0, 1) for axis in np.meshgrid(np.arange(SIZE), np.arange(SIZE)))
    return paint(TEXTURES[kind](x, y).astype(np.float64), rng, ink, paper, noise=14.0)


def blot(colour: Colours, rng: np.random.Generator, ink: Colours, paper: Colours) -> Image:
    """Draw an irregular blot of a colour.

    Args:
        colour: the darkest and the lightest of the blot.
        rng: source of randomness.
        ink: not used: the class says the colour.
        paper: colours of the background.
    """
    from PIL import Image, ImageDraw

    mask = Image.new("L", (CANVAS, CANVAS), 0)
    x, y = (CANVAS / 2 + rng.uniform(-5, 5) for _ in range(2))
    radii = rng.uniform(15, 27, 9)
    angles = [2 * pi * k / len(radii) for k in range(len(radii))]
    points = [(x + r * cos(a), y + r * sin(a)) for r, a in zip(radii.tolist(), angles, strict=True)]
    ImageDraw.Draw(mask).polygon(points, fill=255)
    return paint(reduced(mask), rng, colour, paper, noise=10.0)


def clock(hour: int, rng: np.random.Generator, ink: Colours, paper: Colours) -> Image:
    """Draw the face of a clock with one hand.

    Args:
        hour: where the hand points, 1 to 12.
        rng: source of randomness.
        ink: colours of rim and hand.
        paper: colours of the background.
    """
    from PIL import Image, ImageDraw

    mask = Image.new("L", (CANVAS, CANVAS), 0)
    draw, radius = ImageDraw.Draw(mask), rng.uniform(25, 29)
    x, y = (CANVAS / 2 + rng.uniform(-2, 2) for _ in range(2))
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=255, width=3)
    angle, length = (hour * 30 + rng.uniform(-6, 6)) * pi / 180, radius * rng.uniform(0.7, 0.9)
    draw.line((x, y, x + length * sin(angle), y - length * cos(angle)), fill=255, width=6)
    draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=255)
    return paint(reduced(mask), rng, ink, paper)


def place(cell: tuple[int, int], rng: np.random.Generator, ink: Colours, paper: Colours) -> Image:
    """Draw a small square somewhere in one of nine cells.

    Args:
        cell: its column and row, each 0 to 2.
        rng: source of randomness.
        ink: colours of the square.
        paper: colours of the background.
    """
    from PIL import Image, ImageDraw

    mask = Image.new("L", (CANVAS, CANVAS), 0)
    radius = rng.uniform(5, 8)
    x, y = (CANVAS / 2 + 20 * (k - 1) + rng.uniform(-4, 4) for k in cell)
    ImageDraw.Draw(mask).rectangle((x - radius, y - radius, x + radius, y + radius), fill=255)
    return paint(reduced(mask), rng, ink, paper, noise=16.0)


def _plane(x0: float, y0: float) -> tuple[Array, Array]:
    """Coordinates in -1 to 1 of each pixel, moved. Shapes: (SIZE, SIZE) each."""
    line = np.linspace(-1, 1, SIZE)
    x, y = np.meshgrid(line, line)
    return x - x0, y - y0


SHADES: dict[str, Callable[[Array, Array], Array]] = {  # none is another one with its ends exchanged
    "across": lambda x, y: x,
    "down": lambda x, y: y,
    "slanting down": lambda x, y: x + y,
    "slanting up": lambda x, y: x - y,
    "round": lambda x, y: np.hypot(x, y),
    "saddle": lambda x, y: x * y,
    "band": lambda x, y: np.abs(y),
    "column": lambda x, y: np.abs(x),
}

TEXTURES: dict[str, Callable[[Array, Array], Array]] = {  # x and y count periods
    "checks": lambda x, y: (np.floor(2 * x) + np.floor(2 * y)) % 2,
    "bricks": lambda x, y: ((x + np.floor(2 * y) / 2) % 1 > 0.2) & ((2 * y) % 1 > 0.3),
    "net": lambda x, y: (x % 1 < 0.3) | (y % 1 < 0.3),
    "waves": lambda x, y: (2 * y + 0.35 * np.sin(2 * pi * x)) % 1 < 0.5,
    "zigzags": lambda x, y: (2 * y + 1.2 * np.abs(x % 1 - 0.5)) % 1 < 0.5,
    "lozenges": lambda x, y: np.abs(x % 1 - 0.5) + np.abs(y % 1 - 0.5) < 0.4,
    "rings": lambda x, y: np.abs(np.hypot(x % 1 - 0.5, y % 1 - 0.5) - 0.33) < 0.12,
    "plusses": lambda x, y: (
        (np.minimum(np.abs(x % 1 - 0.5), np.abs(y % 1 - 0.5)) < 0.13)
        & (np.maximum(np.abs(x % 1 - 0.5), np.abs(y % 1 - 0.5)) < 0.36)
    ),
}
