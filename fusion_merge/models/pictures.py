"""Pictures of every kind as bytes: processors would scale floating-point numbers of 0-1 once more, in silence."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from fusion_merge.errors import DataError, reason


def as_bytes(image: Any) -> Any:
    """Return a PIL image in RGB, or an array of whole numbers 0-255.

    Transparency is dropped, as the processors of transformers 4 do, with which the published figures were made; those
    of transformers 5 put a white ground behind it. Grey pictures of 16 bits keep their upper 8.

    Args:
        image: a PIL image, or an array or tensor of whole numbers 0-255 or of floating-point numbers 0-1.

    Shape:
        an array's is kept.

    Raises:
        DataError: if it is neither, or holds other values.
    """
    if isinstance(image, Image.Image):
        return _in_rgb(image)
    try:
        array = _array(image)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"an image of type {type(image).__name__} cannot be used: {reason(error)}") from error
    if array.dtype.kind not in "uif" or array.size == 0:
        raise DataError(f"an image of type {type(image).__name__} holds {array.dtype} values; give a PIL image")
    low, high = array.min(), array.max()
    floating = array.dtype.kind == "f"
    if not (low >= 0 and high <= (1 if floating else 255)):  # nor NaN
        raise DataError(
            f"an image holds {array.dtype} values from {low:g} to {high:g}; "
            "give a PIL image, whole numbers 0-255, or floating-point numbers 0-1, not normalised yet"
        )
    return np.rint(array * 255).astype(np.uint8) if floating else array.astype(np.uint8)


def _in_rgb(image: Image.Image) -> Image.Image:
    """Return a picture in RGB as PIL converts it: transparency is dropped, animations show their current frame."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # PIL would cut it off at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")  # as PIL reads RGB of 16 bits
    if image.mode in ("I", "F"):
        return Image.fromarray(as_bytes(np.asarray(image))).convert("RGB")
    if image.mode == "P":  # by way of RGBA, which gives the same and no advice about transparency
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _array(image: Any) -> np.ndarray:
    if not isinstance(image, Tensor):
        return np.asarray(image)
    tensor = image.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # NumPy knows no bfloat16
