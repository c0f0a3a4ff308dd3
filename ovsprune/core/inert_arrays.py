"""numpy's arrays in a pickle, as tensors, without numpy: what detectron2's model zoos hold.

Under the rules of :mod:`ovsprune.core.inert`: nothing is imported or called, every number is
checked before torch sees it, and arrays over the same bytes share one storage.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ovsprune.core.errors import CheckpointError
from ovsprune.core.sketch import Deaf, Sketch, Storage, view

__all__ = ["Arrays"]

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
_MODULES = ("numpy.core", "numpy._core")  # numpy 1, and numpy 2


class _Format(Deaf):
    """A dtype: its code, and whether its bytes lie in this machine's order."""

    __slots__ = ("code", "little")

    def __init__(self, code: Any) -> None:
        self.code, self.little = code, True

    def __setstate__(self, state: Any) -> None:
        """(version, order, ...): ``<`` is little, ``|`` of one byte."""
        self.little = isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", "|")


class _Array(Sketch):
    """An array; unknown until the pickle gives its content, and where that is no plain numbers."""

    __slots__ = ("known", "shared")

    def __init__(self, shared: dict[tuple[int, str], tuple[bytes, Storage]]) -> None:
        super().__init__(Storage(torch.empty(0)), (0, (0,), (1,)))
        self.known, self.shared = False, shared

    @property
    def whole(self) -> bool:
        """Whether it holds plain numbers."""
        return self.known

    def __setstate__(self, state: Any) -> None:
        """(version, size, dtype, whether columns come first, bytes)."""
        self.known = False
        if not isinstance(state, tuple) or len(state) != 5:
            return
        _, size, kind, columns_first, raw = state
        plain = isinstance(kind, _Format) and kind.code in _DTYPES and kind.little
        if not plain or type(raw) is not bytes:
            return  # of objects, say, in a training's history
        if not isinstance(size, tuple) or any(type(n) is not int or n < 0 for n in size):
            raise CheckpointError("it describes an array by something that is not a size")
        dtype, count = _DTYPES[kind.code], math.prod(size)
        if len(raw) != count * dtype.itemsize:
            raise CheckpointError(
                f"an array has {len(raw)} bytes where {count} values of {dtype} need "
                f"{count * dtype.itemsize}: the file is cut short or damaged"
            )
        key = id(raw), kind.code
        if key not in self.shared:
            numbers = torch.frombuffer(bytearray(raw), dtype=dtype) if raw else torch.empty(0)
            self.shared[key] = raw, Storage(numbers.to(dtype))
        sketch = view(self.shared[key][1], 0, size, _strides(size, bool(columns_first)))
        self.storage, self.numbers, self.known = sketch.storage, sketch.numbers, True


class Arrays:
    """Answers to a pickle that asks for numpy, for one reading."""

    def __init__(self) -> None:
        self._shared: dict[tuple[int, str], tuple[bytes, Storage]] = {}

    def answer(self, key: str) -> Any:
        """What stands for ``key``; None if that is nothing of numpy's arrays."""
        if key == "numpy.ndarray":
            return key  # a kind of array, which nothing asks about
        if key == "numpy.dtype":
            return lambda code, *rest: _Format(code)
        if key in [f"{module}.multiarray._reconstruct" for module in _MODULES]:
            return lambda *given: _Array(self._shared)
        if key == "_codecs.encode":  # how a pickle before version 3 holds bytes,
            return _encode
        if key == "__builtin__.bytes":  # and no bytes
            return lambda *given: b""
        return None


def _strides(size: tuple[int, ...], columns_first: bool) -> tuple[int, ...]:
    axes = list(range(len(size)))
    strides, step = [0] * len(size), 1
    for axis in axes if columns_first else reversed(axes):
        strides[axis], step = step, step * max(size[axis], 1)
    return tuple(strides)


def _encode(text: Any, encoding: Any = "") -> bytes:
    known = isinstance(text, str) and encoding in ("latin1", "latin-1")
    return text.encode("latin1", "replace") if known else b""
