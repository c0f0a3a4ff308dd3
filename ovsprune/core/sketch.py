"""Tensors as a pickle describes them, for :mod:`ovsprune.core.inert`; every number is checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ovsprune.core.errors import CheckpointError

__all__ = ["Deaf", "Sketch", "Storage", "view"]


class Deaf:
    """Base of what the pickle machine may hold of ours: it cannot be rebuilt from inside."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Ignore what a pickle would set."""


class Storage(Deaf):
    """Raw numbers with a type, filled at once (zip) or at the end of the file (plain)."""

    __slots__ = ("data",)

    def __init__(self, data: Tensor) -> None:
        self.data = data


class Sketch(Deaf):
    """A tensor as the pickle describes it; torch sees it when the pickle is over."""

    __slots__ = ("numbers", "storage")

    @property
    def whole(self) -> bool:
        """Whether it describes a tensor; an array may turn out to hold something else."""
        return True

    def __init__(self, storage: Storage, numbers: tuple[Any, ...]) -> None:
        self.storage, self.numbers = storage, numbers

    def tensor(self) -> Tensor:
        """The tensor itself."""
        offset, size, stride = self.numbers
        return torch.as_strided(self.storage.data, size, stride, offset)


def view(storage: Any, offset: Any, size: Any, stride: Any) -> Sketch:
    """The tensor that lies in ``storage``; every number is checked before torch sees it."""
    if not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise CheckpointError("it describes a tensor by something that is not a size")
    numbers = [offset, *size, *stride]
    if not isinstance(storage, Storage) or any(type(n) is not int or n < 0 for n in numbers):
        raise CheckpointError("it describes a tensor by something that is not a size")
    if len(size) != len(stride) or len(size) > 16:
        raise CheckpointError(f"a tensor has {len(size)} sizes and {len(stride)} strides")
    count = 1
    for length in size:
        count *= length
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if count else 0
    if count > storage.data.numel() or (count and last >= storage.data.numel()):
        raise CheckpointError(
            f"a tensor of size {tuple(size)} reaches beyond its {storage.data.numel()} values"
        )
    return Sketch(storage, (offset, size, stride))
