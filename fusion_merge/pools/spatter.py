"""Drops of water or mud on an image: the one corruption that is longer than a formula."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy import ndimage

Array = np.ndarray[Any, Any]

_WATER = np.array([175, 238, 238]) / 255  # pale turquoise
_MUD = np.array([63, 42, 20]) / 255  # brown
_RELIEF = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])  # light from one side
_FARTHEST = 20  # pixels from an edge, beyond which a drop is as at this distance
_WEAK, _STRONG = 50, 150  # gradients between which an edge goes on, and above which one begins
_FAINT = 0.8  # mud that covers less than this is not there


class Spatter(NamedTuple):
    """The constants of one severity.

    Attributes:
        mean: of the random liquid.
        deviation: of the random liquid.
        smoothing: deviation of the blur that makes drops of it, in pixels.
        threshold: the liquid below is not there.
        strength: of water, how opaque the densest is; of mud, the deviation of the blur of its edges, in pixels.
        mud: mud rather than water.
    """

    mean: float
    deviation: float
    smoothing: float
    threshold: float
    strength: float
    mud: bool


SPATTERS: dict[str, tuple[Spatter, ...]] = {
    "cifar-c": (
        Spatter(0.62, 0.1, 0.7, 0.70, 0.5, mud=False),
        Spatter(0.65, 0.1, 0.8, 0.70, 0.5, mud=False),
        Spatter(0.65, 0.3, 1.0, 0.69, 0.5, mud=False),
        Spatter(0.65, 0.1, 0.7, 0.69, 0.6, mud=True),
        Spatter(0.65, 0.1, 0.5, 0.68, 0.6, mud=True),
    ),
    "imagenet-c": (
        Spatter(0.65, 0.3, 4.0, 0.69, 0.6, mud=False),
        Spatter(0.65, 0.3, 3.0, 0.68, 0.6, mud=False),
        Spatter(0.65, 0.3, 2.0, 0.68, 0.5, mud=False),
        Spatter(0.65, 0.3, 1.0, 0.65, 1.5, mud=True),
        Spatter(0.67, 0.4, 1.0, 0.65, 1.5, mud=True),
    ),
}
"""For each set of constants, the severities 1-5."""


def spattered(pixels: Array, constants: Spatter, rng: np.random.Generator) -> Array:
    r"""Return an image with drops on it.

    A random field is blurred, and liquid is where it is above a threshold. Mud covers with m, the blurred place of
    the liquid; water adds light with m, which is denser in the middle of a drop and has a lit side.

    .. math:: y_\text{mud} = (1 - m)\,x + m\,\text{brown}, \qquad y_\text{water} = x + m\,\text{turquoise}

    Source: Hendrycks & Dietterich, `spatter`. Distances to the edges of drops are exact here, where OpenCV's are
    approximate. An image without any drop stays as it is.

    Args:
        pixels: values in 0-1.
        constants: those of one severity.
        rng: draws the liquid.

    Shape:
        (H, W, 3) → (H, W, 3), not clipped to 0-1.
    """
    field = rng.normal(constants.mean, constants.deviation, pixels.shape[:2])
    liquid = ndimage.gaussian_filter(field, constants.smoothing, mode="nearest")  # (H, W)
    liquid = np.where(liquid < constants.threshold, 0.0, liquid)
    if constants.mud:
        cover = ndimage.gaussian_filter((liquid > 0).astype(float), constants.strength, mode="nearest")
        cover = np.where(cover < _FAINT, 0.0, cover)[..., None]  # (H, W, 1)
        return (1 - cover) * pixels + cover * _MUD
    light = _lit(np.clip(255 * liquid, 0, 255).astype(np.uint8))
    densest = light.max()
    if densest == 0:
        return pixels
    return pixels + (constants.strength * light / densest)[..., None] * _WATER


def _lit(liquid: Array) -> Array:
    """Return how much light drops add, on some scale. Shape: (H, W) → (H, W)."""
    edges = _edges(liquid)
    distance = ndimage.distance_transform_edt(~edges) if edges.any() else np.full(liquid.shape, float(_FARTHEST))
    depth = _box(np.minimum(distance, _FARTHEST)).astype(np.uint8)
    relief = ndimage.correlate(_equalised(depth).astype(float), _RELIEF, mode="mirror")
    return liquid * np.rint(_box(np.clip(relief, 0, 255)))


def _box(values: Array) -> Array:
    return np.asarray(ndimage.uniform_filter(values, 3, mode="mirror"))


def _equalised(values: Array) -> Array:
    """Spread values 0-255 so that each part of the range is equally frequent."""
    counts = np.bincount(values.ravel(), minlength=256)
    below = counts.cumsum() - counts[counts.nonzero()[0][0]]  # without the smallest value
    if below[-1] == 0:  # one value only
        return values
    return np.rint(255 * below[values] / below[-1]).astype(np.uint8)


def _edges(image: Array) -> Array:
    """Find edges as Canny does: where the gradient is greatest across the edge, from strong ones on along weak ones.

    Shape:
        (H, W) → (H, W) of booleans.
    """
    values = image.astype(float)
    down, right = (ndimage.sobel(values, axis=axis, mode="nearest") for axis in (0, 1))
    size = np.abs(down) + np.abs(right)
    octant = np.rint(np.arctan2(down, right) / (np.pi / 4)).astype(int) % 4
    around = np.pad(size, 1)
    greatest = np.zeros(size.shape, dtype=bool)
    height, width = size.shape
    for which, (dy, dx) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead = around[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]
        behind = around[1 - dy : 1 - dy + height, 1 - dx : 1 - dx + width]
        greatest |= (octant == which) & (size > behind) & (size >= ahead)
    lines, count = ndimage.label(greatest & (size > _WEAK), structure=np.ones((3, 3)))
    strong = np.unique(lines[greatest & (size > _STRONG)])
    return np.isin(lines, strong[strong > 0]) if count else np.zeros(size.shape, dtype=bool)
