"""Pictures of every kind as bytes: processors would scale floating-point numbers of 0-1 once more, in silence."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from fusion_merge.errors import DataError, reason


def as_bytes(image: Any) -> Any:
    """Return a PIL image in RGB, or an array of whole numbers 0-255.

    Args:
        image: a PIL image, or an array or tensor of whole numbers 0-255 or of floating-point numbers 0-1.

    Shape:
        an array's is kept.

    Raises:
        DataError: if it is neither, or holds other values.
    """
    if hasattr(image, "convert"):
        return image.convert("RGB")
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


def _array(image: Any) -> np.ndarray:
    if not isinstance(image, Tensor):
        return np.asarray(image)
    tensor = image.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # NumPy knows no bfloat16
