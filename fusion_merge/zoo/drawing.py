"""Small pictures drawn with Pillow and NumPy: glyphs, shapes, stripes, dots and patches of photographs.

Every function takes the random generator it draws from, and returns one RGB image of `SIZE` × `SIZE` pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import cos, pi, sin
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

SIZE = 32
CANVAS = 64  # masks are drawn at twice the size and reduced, which smooths their edges

Point = tuple[float, float]
Colours = tuple[tuple[int, int, int], tuple[int, int, int]]  # darkest and lightest red, green, blue

BLACK: Colours = ((0, 0, 0), (0, 0, 0))
WHITE: Colours = ((255, 255, 255), (255, 255, 255))


def glyph(
    text: str, font_path: str, rng: np.random.Generator, ink: Colours, paper: Colours, tilt: float = 8.0
) -> Image:
    """Draw one character, slightly turned, scaled and moved, in a random colour on a plain background.

    Args:
        text: the character.
        font_path: path of a TrueType font which has it.
        rng: source of randomness.
        ink: colours of the character.
        paper: colours of the background.
        tilt: largest turn in degrees.
    """
    from PIL import Image, ImageDraw

    mask = Image.new("L", (CANVAS, CANVAS), 0)
    font = _font(font_path, int(rng.integers(52, 61)))
    left, top, right, bottom = font.getbbox(text)
    corner = [(CANVAS - low - high) / 2 + rng.uniform(-3, 3) for low, high in ((left, right), (top, bottom))]
    ImageDraw.Draw(mask).text((corner[0], corner[1]), text, fill=255, font=font)
    mask = mask.rotate(float(rng.uniform(-tilt, tilt)), resample=Image.Resampling.BILINEAR)
    return paint(reduced(mask), rng, ink, paper)


def shape(name: str, rng: np.random.Generator, ink: Colours, paper: Colours) -> Image:
    """Draw one filled shape of `SHAPES` in a random colour, size and place on a noisy background.

    Args:
        name: a key of `SHAPES`.
        rng: source of randomness.
        ink: colours of the shape.
        paper: colours of the background.
    """
    from PIL import Image, ImageDraw

    mask = Image.new("L", (CANVAS, CANVAS), 0)
    radius, turn = rng.uniform(19, 26), rng.uniform(-0.2, 0.2)
    centre = [CANVAS / 2 + rng.uniform(-5, 5) for _ in range(2)]

    def place(points: list[Point]) -> list[Point]:
        c, s = cos(turn) * radius, sin(turn) * radius
        return [(centre[0] + c * x - s * y, centre[1] + s * x + c * y) for x, y in points]

    draw = ImageDraw.Draw(mask)
    for points, fill in SHAPES[name]():
        draw.polygon(place(points), fill=fill)
    return paint(reduced(mask), rng, ink, paper, noise=20.0)


def stripes(degrees: float, rng: np.random.Generator, ink: Colours, paper: Colours) -> Image:
    """Draw a sine grating of a random width and phase.

    Args:
        degrees: direction of the stripes, 0 is horizontal, 90 vertical.
        rng: source of randomness.
        ink: colours of the one half.
        paper: colours of the other.
    """
    angle = (degrees + rng.uniform(-5, 5)) * pi / 180
    y, x = np.mgrid[:SIZE, :SIZE]
    across = sin(angle) * x + cos(angle) * y
    wave = np.sin(2 * pi * across / rng.uniform(6, 11) + rng.uniform(0, 2 * pi))
    return paint(np.clip(0.5 + 1.2 * wave, 0, 1), rng, ink, paper, noise=12.0)


def dots(count: int, rng: np.random.Generator, ink: Colours, paper: Colours) -> Image:
    """Draw dots of one size, none touching another.

    Args:
        count: how many, 1 to 9.
        rng: source of randomness.
        ink: colours of the dots.
        paper: colours of the background.
    """
    from PIL import Image, ImageDraw

    mask = Image.new("L", (CANVAS, CANVAS), 0)
    draw, radius = ImageDraw.Draw(mask), rng.uniform(5.0, 6.5)
    for cell in rng.permutation(9)[:count]:
        x, y = (32 + 19 * (k - 1) + rng.uniform(-3, 3) for k in divmod(int(cell), 3))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return paint(reduced(mask), rng, ink, paper)


def patch(photo: Image, rng: np.random.Generator, held_out: bool, cell: int = 44) -> Image:
    """Cut a square out of one cell of a photograph, as a print with a white edge.

    Cells are split between training and test.

    Squares which show almost nothing (a dark sky, a plain wall) are passed over.

    Args:
        photo: the photograph, RGB.
        rng: source of randomness.
        held_out: cut from the test cells (a fifth of all), otherwise from the others.
        cell: side of a cell in pixels; patches do not cross its border.
    """
    from PIL import Image

    columns, rows = photo.width // cell, photo.height // cell
    cells = [(i, j) for i in range(columns) for j in range(rows) if ((i + 2 * j) % 5 == 0) == held_out]
    best, contrast = photo, -1.0
    for _ in range(8):
        i, j = cells[int(rng.integers(len(cells)))]
        side = int(rng.integers(cell * 3 // 4, cell + 1))
        x, y = (cell * k + int(rng.integers(cell - side + 1)) for k in (i, j))
        square = photo.crop((x, y, x + side, y + side)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        spread = float(np.asarray(square.convert("L")).std())
        if spread > contrast:
            best, contrast = square, spread
        if contrast >= 12.0:
            break
    edge = np.pad(np.zeros((SIZE - 4, SIZE - 4, 1)), ((2, 2), (2, 2), (0, 0)), constant_values=255.0)
    return Image.fromarray(np.maximum(np.asarray(best), edge).astype(np.uint8))


def enlarge(
    pixels: np.ndarray[Any, Any],
    rng: np.random.Generator,
    margin: int = 0,
    ink: Colours = WHITE,
    paper: Colours = BLACK,
) -> Image:
    """Turn a small grey picture into an RGB image.

    Args:
        pixels: values in 0–255. Shape: (H, W).
        rng: source of randomness.
        margin: border in pixels of the result.
        ink: colours of 255.
        paper: colours of 0.
    """
    from PIL import Image

    inner = SIZE - 2 * margin
    grey = Image.fromarray(pixels.astype(np.uint8)).resize((inner, inner), Image.Resampling.BICUBIC)
    canvas = Image.new("L", (SIZE, SIZE), 0)
    canvas.paste(grey, (margin, margin))
    mask = np.asarray(canvas, dtype=np.float64) / 255.0
    return paint(mask, rng, ink, paper)


def reduced(mask: Image) -> np.ndarray[Any, Any]:
    """Halve a mask and give its values in 0–1. Shape: (SIZE, SIZE).

    Args:
        mask: a grey picture of `CANVAS` × `CANVAS` pixels.
    """
    return np.asarray(mask.reduce(CANVAS // SIZE), dtype=np.float64) / 255.0


def paint(
    mask: np.ndarray[Any, Any], rng: np.random.Generator, ink: Colours, paper: Colours, noise: float = 0.0
) -> Image:
    """Colour a mask: 1 becomes a random ink, 0 a random paper.

    Args:
        mask: values in 0–1. Shape: (SIZE, SIZE).
        rng: source of randomness.
        ink: colours of 1.
        paper: colours of 0.
        noise: standard deviation of what is added to each colour of each pixel, of 255.
    """
    from PIL import Image

    front, back = rng.uniform(*ink), rng.uniform(*paper)  # (3,)
    pixels = back + mask[..., None] * (front - back)  # (SIZE, SIZE, 3)
    if noise:
        pixels = pixels + rng.normal(0, noise, pixels.shape)
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def regular(corners: int, inner: float = 1.0, turn: float = 0.0, scale: float = 1.0) -> list[Point]:
    """Give the corners of a regular polygon around the origin, the first on top; with `inner` below 1, of a star.

    Args:
        corners: how many, or how many points of a star.
        inner: radius of the corners between the points of a star; 1 makes no star.
        turn: in radians.
        scale: the radius.
    """
    steps = corners if inner == 1.0 else 2 * corners
    radii = [scale * (1.0 if k % 2 == 0 or inner == 1.0 else inner) for k in range(steps)]
    angles = [2 * pi * k / steps - pi / 2 + turn for k in range(steps)]
    return [(r * cos(a), r * sin(a)) for r, a in zip(radii, angles, strict=True)]


@lru_cache(maxsize=256)
def _font(path: str, size: int) -> FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def _heart() -> list[Point]:
    angles = [2 * pi * k / 40 for k in range(40)]
    return [(sin(a) ** 3, -(13 * cos(a) - 5 * cos(2 * a) - 2 * cos(3 * a) - cos(4 * a)) / 16) for a in angles]


def _cross(arm: float = 0.33) -> list[Point]:
    quarter: list[Point] = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    points: list[Point] = []
    for _ in range(4):
        points += quarter
        quarter = [(-y, x) for x, y in quarter]
    return points


def _moved(points: list[Point], x: float, y: float) -> list[Point]:
    return [(px + x, py + y) for px, py in points]


_ARROW: list[Point] = [(-1, -0.28), (0.1, -0.28), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.28), (-1, 0.28)]
_ROUND = 48

SHAPES: dict[str, Callable[[], list[tuple[list[Point], int]]]] = {
    "circle": lambda: [(regular(_ROUND), 255)],
    "square": lambda: [(regular(4, turn=pi / 4, scale=1.15), 255)],
    "triangle": lambda: [(_moved(regular(3, scale=1.1), 0, 0.2), 255)],
    "star": lambda: [(regular(5, inner=0.4, scale=1.1), 255)],
    "cross": lambda: [(_cross(), 255)],
    "heart": lambda: [(_heart(), 255)],
    "crescent": lambda: [(regular(_ROUND), 255), (_moved(regular(_ROUND, scale=0.85), 0.45, 0), 0)],
    "ring": lambda: [(regular(_ROUND), 255), (regular(_ROUND, scale=0.55), 0)],
    "arrow": lambda: [(_ARROW, 255)],
    "diamond": lambda: [([(0, -1.1), (0.65, 0), (0, 1.1), (-0.65, 0)], 255)],
}
