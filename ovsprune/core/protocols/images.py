"""Calibration images: the interface that importance, recovery and training read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["EndlessPictures", "Pictures"]


class Pictures(Protocol):
    """Calibration pictures: a fixed number of them, the same ones at every pass."""

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield float32 [b, 3, H, W], preprocessed, ``b <= size``, in a fixed order."""
        ...


@runtime_checkable
class EndlessPictures(Pictures, Protocol):
    """Calibration pictures that are made, so that there are always more of their kind."""

    def endless(self) -> Iterator[Tensor]:
        """Yield new pictures [3, H, W] without end, the same ones every time."""
        ...
