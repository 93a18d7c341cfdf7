"""In which precision things are computed: products as mixed precision asks, sums never in half precision."""

from __future__ import annotations

import torch
from torch import Tensor


def exact(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 at least, as sums and means are formed.

    Args:
        tensor: of any shape.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def in_autocast_dtype(x: Tensor) -> Tensor:
    """Return a tensor in the precision that products have here: backward passes run outside of the context.

    Args:
        x: the input of a product, of any shape.
    """
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
