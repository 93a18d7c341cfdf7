r"""The seven corruptions of the robustness benchmark, on NumPy, SciPy and Pillow alone.

The definitions are those of Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019 (arXiv 1903.12261), and of the code beside it. That code has two sets of constants:

- `cifar-c`, made for images of 32×32 and the weaker ones. The default: the code of the merging papers' robustness
  tables (AdaMerging, WEMoE; fusion_bench's `image_corruption`) has these, for images of every size.
- `imagenet-c`, made for photographs of 224×224: much stronger, but for `pixelate`.

Lengths (of blurs, of drops) are in pixels of the image as it is, as there. What comes out is rounded to the nearest of
0-255, where the published code cuts off.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final
from zlib import crc32

import numpy as np
from PIL import Image

from fusion_merge.errors import ConfigError, nearest
from fusion_merge.models.pictures import as_bytes
from fusion_merge.options import LARGEST
from fusion_merge.pools.spatter import SPATTERS, Spatter, spattered

Array = np.ndarray[Any, Any]
SEVERITY = 5
"""The severity of the benchmark: the strongest."""


@dataclass(frozen=True)
class Constants:
    """One set of published constants, each a list over the severities 1-5.

    Attributes:
        size: the width and height of the images that they were made for.
        blurs: radius and deviation of motion blur, in pixels.
        impulses: share of the values that are changed.
        deviations: of gaussian noise, where black is 0 and white 1.
        grids: share of `size` that pixelated images have left.
        contrasts: what differences from the mean are multiplied by.
        qualities: of JPEG.
        spatters: see `Spatter`.
    """

    size: int
    blurs: tuple[tuple[int, float], ...]
    impulses: tuple[float, ...]
    deviations: tuple[float, ...]
    grids: tuple[float, ...]
    contrasts: tuple[float, ...]
    qualities: tuple[int, ...]
    spatters: tuple[Spatter, ...]


CONSTANTS: dict[str, Constants] = {
    "cifar-c": Constants(
        size=32,
        blurs=((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5)),
        impulses=(0.01, 0.02, 0.03, 0.05, 0.07),
        deviations=(0.04, 0.06, 0.08, 0.09, 0.10),
        grids=(0.95, 0.9, 0.85, 0.75, 0.65),
        contrasts=(0.75, 0.5, 0.4, 0.3, 0.15),
        qualities=(80, 65, 58, 50, 40),
        spatters=SPATTERS["cifar-c"],
    ),
    "imagenet-c": Constants(
        size=224,
        blurs=((10, 3.0), (15, 5.0), (15, 8.0), (15, 12.0), (20, 15.0)),
        impulses=(0.03, 0.06, 0.09, 0.17, 0.27),
        deviations=(0.08, 0.12, 0.18, 0.26, 0.38),
        grids=(0.6, 0.5, 0.4, 0.3, 0.25),
        contrasts=(0.4, 0.3, 0.2, 0.1, 0.05),
        qualities=(25, 18, 15, 10, 7),
        spatters=SPATTERS["imagenet-c"],
    ),
}


@final
@dataclass(frozen=True)
class Corruption:
    """One corruption of every image of a task, always the same one of the same image.

    Args:
        name: one of `CORRUPTIONS`.
        severity: 1-5; by default 5, as in the published tables.
        constants: `cifar-c`, with which the published tables were made, or `imagenet-c`.
        seed: of what is drawn, at least 0: the same seed, task and image give the same picture, in whatever order,
            worker or process.

    Raises:
        ConfigError: if there is no such corruption, severity, set of constants or seed.
    """

    name: str
    severity: int = SEVERITY
    constants: str = "cifar-c"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in CORRUPTIONS:
            raise ConfigError(f"`corruption`={self.name!r} is unknown; {nearest(str(self.name), CORRUPTIONS)}")
        if self.constants not in CONSTANTS:
            raise ConfigError(
                f"`corruption_constants`={self.constants!r} are unknown; {nearest(str(self.constants), CONSTANTS)}"
            )
        for key, value, low, high in (("severity", self.severity, 1, 5), ("corruption_seed", self.seed, 0, LARGEST)):
            if type(value) is not int or not low <= value <= high:
                raise ConfigError(f"`{key}`={value!r} is not possible; choose {low}-{high}")

    def apply(self, image: Any, task: str, index: int) -> Image.Image:
        """Return the corrupted image of the same size, in RGB.

        Args:
            image: a PIL image, or an array or tensor as processors take it.
            task: the task's name.
            index: which image of the task it is.
        """
        rng = np.random.default_rng((self.seed, crc32(f"{task}/{self.name}".encode()), index))
        return CORRUPTIONS[self.name](_rgb(image), self.severity, rng, CONSTANTS[self.constants])


def motion_blur(image: Image.Image, severity: int, rng: np.random.Generator, constants: Constants) -> Image.Image:
    r"""Smear along a random direction within 45° of the horizontal, as when the camera moves.

    .. math:: y(p) = \sum_{i=0}^{2r} w_i\, x\big(p + \operatorname{round}(i \cos a, i \sin a)\big), \quad
              w_i \propto e^{-i^2 / 2\sigma^2}, \quad a \sim U(-45°, 45°)

    Beyond its edges the image goes on as it is there. Radius r and σ are `Constants.blurs`.

    Source: Hendrycks & Dietterich, `motion_blur`, which calls ImageMagick's MotionBlur; this is its published formula.

    Args:
        image: RGB.
        severity: 1-5.
        rng: draws the angle a.
        constants: the set of constants.
    """
    radius, sigma = constants.blurs[severity - 1]
    angle = math.radians(rng.uniform(-45, 45))
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    pixels = _floats(image)
    height, width = pixels.shape[:2]
    blurred = np.zeros_like(pixels)
    for step, weight in zip(steps.tolist(), (weights / weights.sum()).tolist(), strict=True):
        rows = np.clip(np.arange(height) + round(step * math.sin(angle)), 0, height - 1)
        columns = np.clip(np.arange(width) + round(step * math.cos(angle)), 0, width - 1)
        blurred += weight * pixels[rows[:, None], columns]  # (H, W, 3)
    return _picture(blurred)


def impulse_noise(image: Image.Image, severity: int, rng: np.random.Generator, constants: Constants) -> Image.Image:
    """Set each value, of each colour by itself, to 0 or to 255 (as likely), with the probability `Constants.impulses`.

    Source: Hendrycks & Dietterich, `impulse_noise`: salt and pepper as scikit-image's `random_noise` defines them.

    Args:
        image: RGB.
        severity: 1-5.
        rng: draws where, and which of the two.
        constants: the set of constants.
    """
    pixels = np.array(image)  # (H, W, 3)
    hit = rng.random(pixels.shape) < constants.impulses[severity - 1]
    salt = rng.random(pixels.shape) < 0.5
    return Image.fromarray(np.where(hit, np.where(salt, 255, 0), pixels).astype(np.uint8))


def gaussian_noise(image: Image.Image, severity: int, rng: np.random.Generator, constants: Constants) -> Image.Image:
    r"""Add to each value, of each colour by itself, noise of mean 0 and the deviation `Constants.deviations`.

    .. math:: y = \operatorname{clip}(x + \sigma \varepsilon, 0, 1), \quad \varepsilon \sim N(0, 1)

    Source: Hendrycks & Dietterich, `gaussian_noise`.

    Args:
        image: RGB.
        severity: 1-5.
        rng: draws ε.
        constants: the set of constants.
    """
    pixels = _floats(image)
    return _picture(pixels + constants.deviations[severity - 1] * rng.standard_normal(pixels.shape))


def pixelate(image: Image.Image, severity: int, rng: np.random.Generator, constants: Constants) -> Image.Image:
    """Reduce by averaging over boxes, and enlarge again by repeating pixels.

    A side of s pixels has `Constants.grids` × min(s, `Constants.size`) blocks, rounded down: a grid that does not grow
    with the image, as where the tables were made. There the picture stays as small as 32×32 and is enlarged by the
    processor; here it has its own size again.

    Source: Hendrycks & Dietterich, `pixelate`.

    Args:
        image: RGB.
        severity: 1-5.
        rng: not used.
        constants: the set of constants.
    """
    share = constants.grids[severity - 1]
    width, height = (max(1, int(share * min(side, constants.size))) for side in image.size)
    return image.resize((width, height), Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX)


def spatter(image: Image.Image, severity: int, rng: np.random.Generator, constants: Constants) -> Image.Image:
    """Let drops of water (weaker severities) or mud (4 and 5) lie on the lens; see `spattered`.

    Source: Hendrycks & Dietterich, `spatter`.

    Args:
        image: RGB.
        severity: 1-5.
        rng: draws the drops.
        constants: the set of constants.
    """
    return _picture(spattered(_floats(image), constants.spatters[severity - 1], rng))


def contrast(image: Image.Image, severity: int, rng: np.random.Generator, constants: Constants) -> Image.Image:
    r"""Move each value towards the mean of its colour over the image.

    .. math:: y = \bar x + c\,(x - \bar x)

    The factor c is `Constants.contrasts`.

    Source: Hendrycks & Dietterich, `contrast`.

    Args:
        image: RGB.
        severity: 1-5.
        rng: not used.
        constants: the set of constants.
    """
    pixels = _floats(image)
    means = pixels.mean(axis=(0, 1), keepdims=True)  # (1, 1, 3)
    return _picture(means + constants.contrasts[severity - 1] * (pixels - means))


def jpeg_compression(image: Image.Image, severity: int, rng: np.random.Generator, constants: Constants) -> Image.Image:
    """Write the image as a JPEG file of the quality `Constants.qualities`, as Pillow does, and read it.

    Source: Hendrycks & Dietterich, `jpeg_compression`.

    Args:
        image: RGB.
        severity: 1-5.
        rng: not used.
        constants: the set of constants.
    """
    file = io.BytesIO()
    image.save(file, "JPEG", quality=constants.qualities[severity - 1])
    with Image.open(file) as compressed:
        return compressed.convert("RGB")


Corrupt = Callable[[Image.Image, int, np.random.Generator, Constants], Image.Image]

CORRUPTIONS: Mapping[str, Corrupt] = {
    "motion_blur": motion_blur,
    "impulse_noise": impulse_noise,
    "gaussian_noise": gaussian_noise,
    "pixelate": pixelate,
    "spatter": spatter,
    "contrast": contrast,
    "jpeg_compression": jpeg_compression,
}
"""Every corruption by name, in the order of the published tables."""


def _rgb(image: Any) -> Image.Image:
    given = as_bytes(image)
    if isinstance(given, Image.Image):
        return given
    array = np.asarray(given)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3):
        array = array.transpose(1, 2, 0)  # (H, W, C)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    return Image.fromarray(array).convert("RGB")


def _floats(image: Image.Image) -> Array:
    return np.asarray(image, dtype=np.float64) / 255


def _picture(pixels: Array) -> Image.Image:
    return Image.fromarray(np.rint(255 * np.clip(pixels, 0, 1)).astype(np.uint8))
