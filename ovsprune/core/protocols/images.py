"""Calibration images: the interface that importance, recovery and training read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["EndlessPictures", "Pictures"]


class Pictures(Protocol):
    """Fixed set of calibration images, the same in every pass."""

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield preprocessed batches, float32 [b, 3, H, W] with ``b <= size``, in a fixed order."""
        ...


@runtime_checkable
class EndlessPictures(Pictures, Protocol):
    """Procedurally generated calibration images, of which there is no end."""

    def endless(self) -> Iterator[Tensor]:
        """Yield new images [3, H, W] without end; every call yields the same sequence."""
        ...
