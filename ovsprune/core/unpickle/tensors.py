"""Stubs of the tensors that a pickle describes; every number is checked before torch sees it.

Used by :mod:`ovsprune.core.unpickle.machine`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ovsprune.core.errors import CheckpointError

__all__ = ["Storage", "Stub", "TensorStub", "tensor_stub"]

_MAX_DIMS = 16


class Stub:
    """Base class of our objects that a pickle can hold; the pickle cannot set their attributes."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Ignore the state that the pickle gives."""


class Storage(Stub):
    """Flat tensor of one dtype; filled at once (zip layout) or at the end (legacy layout)."""

    __slots__ = ("data",)

    def __init__(self, data: Tensor) -> None:
        self.data = data


class TensorStub(Stub):
    """Description of a tensor; it becomes a tensor after the pickle has been read.

    Args:
        storage: The storage that holds its values.
        layout: Offset (int), size and stride (tuples of int) in the storage, in elements.
    """

    __slots__ = ("layout", "storage")

    def __init__(self, storage: Storage, layout: tuple[Any, ...]) -> None:
        self.storage, self.layout = storage, layout

    @property
    def is_tensor(self) -> bool:
        """True if it describes a tensor; False for an array of something else than numbers."""
        return True

    def tensor(self) -> Tensor:
        """Return the tensor, a view of the storage."""
        offset, size, stride = self.layout
        # tensor_stub has checked that the view lies inside the storage.
        return torch.as_strided(self.storage.data, size, stride, offset)


def tensor_stub(storage: Any, offset: Any, size: Any, stride: Any) -> TensorStub:
    """Return the stub of a tensor in ``storage``.

    Raises:
        CheckpointError: An argument has the wrong type, or the tensor exceeds its storage.
    """
    if not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise CheckpointError("it describes a tensor by something that is not a size")
    numbers = [offset, *size, *stride]
    # type(), because isinstance takes True for an int.
    if not isinstance(storage, Storage) or any(type(n) is not int or n < 0 for n in numbers):
        raise CheckpointError("it describes a tensor by something that is not a size")
    if len(size) != len(stride) or len(size) > _MAX_DIMS:
        raise CheckpointError(f"a tensor has {len(size)} sizes and {len(stride)} strides")
    # Python integers do not overflow, unlike torch's own check of the bounds.
    count = 1
    for length in size:
        count *= length
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if count else 0
    if count > storage.data.numel() or (count and last >= storage.data.numel()):
        raise CheckpointError(
            f"a tensor of size {tuple(size)} reaches beyond its {storage.data.numel()} values"
        )
    return TensorStub(storage, (offset, size, stride))
