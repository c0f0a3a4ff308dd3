"""Stubs that read numpy arrays in a pickle as tensors; detectron2's model zoos hold such.

The rules of :mod:`ovsprune.core.unpickle.machine` apply: nothing is imported or called, and every
number is checked before torch sees it. Arrays over the same bytes share one storage.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ovsprune.core.errors import CheckpointError
from ovsprune.core.unpickle.tensors import Storage, Stub, TensorStub, tensor_stub

__all__ = ["ArrayNames"]

_DTYPES = {
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
    "b1": torch.bool,
}
_MODULES = ("numpy.core", "numpy._core")  # numpy 1 and numpy 2


class _DtypeStub(Stub):
    """Stub of a numpy dtype: its code, and True if its byte order is little-endian."""

    __slots__ = ("code", "little")

    def __init__(self, code: Any) -> None:
        self.code, self.little = code, True

    def __setstate__(self, state: Any) -> None:
        """Read ``(version, order, ...)``: ``<`` is little-endian, ``|`` a type of one byte."""
        self.little = isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", "|")


class _ArrayStub(TensorStub):
    """Stub of an array; ``numeric`` becomes True when the pickle sets numbers as its content."""

    __slots__ = ("numeric", "shared")

    def __init__(self, shared: dict[tuple[int, str], tuple[bytes, Storage]]) -> None:
        super().__init__(Storage(torch.empty(0)), (0, (0,), (1,)))  # empty until __setstate__
        self.numeric, self.shared = False, shared

    @property
    def is_tensor(self) -> bool:
        """True if it holds plain numbers."""
        return self.numeric

    def __setstate__(self, state: Any) -> None:
        """Read ``(version, size, dtype, is_fortran_order, bytes)``."""
        self.numeric = False
        if not isinstance(state, tuple) or len(state) != 5:
            return
        _, size, dtype_stub, fortran_order, raw = state
        plain = (
            isinstance(dtype_stub, _DtypeStub) and dtype_stub.code in _DTYPES and dtype_stub.little
        )
        if not plain or type(raw) is not bytes:
            return  # an array of objects, for example in a training history
        if not isinstance(size, tuple) or any(type(n) is not int or n < 0 for n in size):
            raise CheckpointError("it describes an array by something that is not a size")
        dtype, count = _DTYPES[dtype_stub.code], math.prod(size)
        if len(raw) != count * dtype.itemsize:
            raise CheckpointError(
                f"an array has {len(raw)} bytes, but {count} values of {dtype} need "
                f"{count * dtype.itemsize}: the file is cut short or damaged"
            )
        # ``shared`` keeps ``raw`` alive, so that its id is not reused.
        key = id(raw), dtype_stub.code
        if key not in self.shared:
            # frombuffer needs at least one byte, and warns about `bytes`, which cannot be written
            # to.
            numbers = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0)
            self.shared[key] = raw, Storage(numbers.to(dtype))
        stub = tensor_stub(self.shared[key][1], 0, size, _strides(size, bool(fortran_order)))
        self.storage, self.layout, self.numeric = stub.storage, stub.layout, True


class ArrayNames:
    """Replacements for the numpy names in one pickle."""

    def __init__(self) -> None:
        self._shared: dict[tuple[int, str], tuple[bytes, Storage]] = {}

    def replacement(self, key: str) -> Any:
        """Return the object for the name ``key``; None if it does not belong to numpy arrays."""
        if key == "numpy.ndarray":
            return key  # an array class, passed to _reconstruct and ignored there
        if key == "numpy.dtype":
            return lambda code, *rest: _DtypeStub(code)
        if key in [f"{module}.multiarray._reconstruct" for module in _MODULES]:
            return lambda *args: _ArrayStub(self._shared)
        if key == "_codecs.encode":  # bytes in pickles before protocol 3
            return _encode
        if key == "__builtin__.bytes":  # empty bytes in such pickles
            return lambda *args: b""
        return None


def _strides(size: tuple[int, ...], fortran_order: bool) -> tuple[int, ...]:
    """Return contiguous strides in elements, for C or Fortran order."""
    axes = list(range(len(size)))
    strides, step = [0] * len(size), 1
    for axis in axes if fortran_order else reversed(axes):
        # max(..., 1): as torch's own strides of a tensor with an empty axis.
        strides[axis], step = step, step * max(size[axis], 1)
    return tuple(strides)


def _encode(text: Any, encoding: Any = "") -> bytes:
    """Replace ``_codecs.encode``: accepts latin-1, which maps each character to one byte."""
    valid = isinstance(text, str) and encoding in ("latin1", "latin-1")
    return text.encode("latin1", "replace") if valid else b""
