"""The images of a task as a model sees them: preprocessed, kept where they are few, and the bad ones among them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from enum import StrEnum
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fusion_merge.errors import BadImageError, DataError
from fusion_merge.pools.datasets import ImageTask
from fusion_merge.pools.decoding import is_image_s_fault, why

CACHE_BYTES = 128 * 2**20

Preprocess = Callable[[Any], Tensor]
"""From one image to a tensor (3, height, width)."""


class OnBadImage(StrEnum):
    """What becomes of an image that cannot be decoded or preprocessed."""

    ERROR = "error"
    SKIP = "skip"


class TaskImages(Dataset[tuple[Tensor, int]]):
    """The preprocessed images of a task, with their labels; small datasets are kept in memory once read.

    Args:
        task: the task.
        preprocess: from one image to a tensor (3, height, width).
        cache_bytes: a dataset that takes at most this much memory when preprocessed is kept.
        on_bad_image: whether loaders end with an error at an image that cannot be used, or leave it out.

    Raises:
        DataError: if the first image cannot be used, or none at all where bad images are left out.
    """

    def __init__(
        self,
        task: ImageTask,
        preprocess: Preprocess,
        cache_bytes: int = CACHE_BYTES,
        *,
        on_bad_image: OnBadImage = OnBadImage.ERROR,
    ) -> None:
        self.task = task
        self.on_bad_image = on_bad_image
        self.bad: dict[int, str] = {}
        self.told = False  # whether it was said that bad ones are replaced
        self._preprocess = preprocess
        self._cache: dict[int, tuple[Tensor, int]] | None = None
        first = self.good(0)[0]
        self.shape = tuple(first.shape)
        if first.nbytes * len(task) <= cache_bytes:
            self._cache = {}

    @property
    def cached(self) -> bool:
        """Whether the images are kept in memory, so that worker processes would only cost."""
        return self._cache is not None

    def __len__(self) -> int:
        return len(self.task)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")  # which ends an iteration
        index %= len(self)
        if index in self.bad:
            raise BadImageError(self.bad[index])
        if self._cache is None:
            return self._read(index)
        if index not in self._cache:
            self._cache[index] = self._read(index)
        return self._cache[index]

    def good(self, index: int) -> tuple[Tensor, int]:
        """Return an image or, where that one is bad and left out, the next good one in the order of the dataset.

        It depends on the index alone, so that batches are the same in every process and after a restart.

        Args:
            index: from 0 to the number of images less one.

        Raises:
            DataError: if the image is bad and bad images are errors, or if all images are bad.
        """
        for place in range(index, index + len(self)):
            try:
                return self[place % len(self)]
            except BadImageError:
                if self.on_bad_image is OnBadImage.ERROR:
                    raise
        raise DataError(f"none of the {len(self)} images of `{self.task.name}` can be used; {self.bad[index]}")

    def fingerprint(self) -> str:
        """Return a short name for the images as a model sees them: all that are kept in memory, or else 16 of them."""
        step = 1 if self.cached else -(-len(self) // 16)
        digest = hashlib.sha256(f"{len(self)}".encode())
        for index in range(0, len(self), step):
            digest.update(self._content(index))
        return digest.hexdigest()[:16]

    def _content(self, index: int) -> bytes:
        try:
            return self[index][0].contiguous().numpy().tobytes()
        except BadImageError:
            if self.on_bad_image is OnBadImage.ERROR:
                raise
            return b"bad"

    def _read(self, index: int) -> tuple[Tensor, int]:
        verb = "read"
        try:
            image, label = self.task.item(index)
            verb = "use"
            if self.task.corruption is not None:
                image = self.task.corruption.apply(image, self.task.name, index)
            pixels = self._preprocess(image)
        except Exception as error:  # decoders and processors raise errors of every kind
            if verb == "read" and isinstance(error, DataError):
                raise
            self._refuse(index, verb, error)
        if not torch.isfinite(pixels).all():
            raise DataError(
                f"image {index} of `{self.task.name}` has NaN or infinite values after preprocessing; "
                "look at the mean, the deviation and the factor of the processor"
            )
        return pixels, label

    def _refuse(self, index: int, verb: str, error: Exception) -> NoReturn:
        """Raise an error that names an image; remember it where the image itself is bad."""
        file = self.task.file_name(index)
        place = f" (`{file}`)" if file else ""
        message = f"cannot {verb} image {index} of `{self.task.name}`{place}: {why(error)}"
        if not is_image_s_fault(error):
            raise DataError(message) from error
        if self.on_bad_image is OnBadImage.ERROR:
            message += "; mend it or take it away, or leave such images out with `on_bad_image=skip`"
        self.bad[index] = message
        raise BadImageError(message) from error
