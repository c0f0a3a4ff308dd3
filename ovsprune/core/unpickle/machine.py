"""Restricted unpickler for torch checkpoints; it imports nothing and calls no foreign code.

Every name in a pickle is replaced by an object of ours that describes a tensor, or by a placeholder
that does nothing. These objects are made for one file. A pickle can change them, but the changes
end with the reading. Used by :mod:`ovsprune.core.unpickle.foreign`.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ovsprune.core.errors import CheckpointError
from ovsprune.core.unpickle.arrays import ArrayNames
from ovsprune.core.unpickle.tensors import Storage, Stub, TensorStub, tensor_stub

__all__ = ["PickleReader", "TensorStub"]

_MAGIC = 0x1950A86A20F9469CFC6C
"""First value in a file of the legacy layout."""
_MAX_PICKLE = 1 << 28
"""Largest accepted data.pkl, in bytes; it holds names and sizes, no weights."""
_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _StorageType(Stub):
    """Stub of a storage class (``torch.FloatStorage``): its dtype."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class PickleReader:
    """Reads one file.

    Attributes:
        unknown_names: Names of classes and functions that were replaced by placeholders.
        is_scripted: True if the file is a TorchScript archive. Its modules are read as dicts of
            attributes.
    """

    def __init__(self) -> None:
        self.unknown_names: set[str] = set()
        self.is_scripted = False
        self._replacements: dict[str, Any] = {}
        self._arrays = ArrayNames()

    def _find(self, module: str, name: str) -> Any:
        key = f"{module}.{name}"
        if key not in self._replacements:
            self._replacements[key] = self._replacement(module, name, key)
        return self._replacements[key]

    def _replacement(self, module: str, name: str, key: str) -> Any:
        """Return what stands for ``module.name``: an object of ours, or a placeholder."""
        if key == "collections.OrderedDict":
            return _fresh_dict()
        if module == "torch" and name in _DTYPES:
            return _StorageType(_DTYPES[name])
        if key in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
            return lambda storage, offset, size, stride, *rest: tensor_stub(
                storage, offset, size, stride
            )
        if key == "torch._utils._rebuild_parameter":  # a parameter is read as its tensor
            return lambda data, *rest: data
        if key == "torch.Size":
            return lambda sizes=(): tuple(sizes)
        if (array := self._arrays.replacement(key)) is not None:
            return array
        if module.split(".")[0] == "__torch__":  # classes of TorchScript archives
            self.is_scripted = True
            return _fresh_module()
        self.unknown_names.add(key)
        return _placeholder(key)

    def zip(self, stream: BinaryIO) -> Any:
        """Read the zip layout (torch 1.6 and later): one pickle, and one stored entry per storage.

        Raises:
            CheckpointError: The archive is not such a file, or is damaged.
        """
        with zipfile.ZipFile(stream) as archive:
            pickles = {n for n in archive.namelist() if n.rpartition("/")[2] == "data.pkl"}
            if len(pickles) != 1:
                kind = "a TorchScript or other archive" if pickles else "no torch checkpoint"
                raise CheckpointError(f"the zip holds {len(pickles)} data.pkl: {kind}")
            data = pickles.pop()
            base = data.removesuffix("data.pkl")
            _check_entries(archive, base)
            storages: dict[str, Storage] = {}

            def load(tag: Any) -> Storage:
                dtype, key, count = _storage_tag(tag)
                if key not in storages:  # several tensors may share a storage
                    raw = archive.read(f"{base}data/{key}")
                    storages[key] = Storage(_numbers(raw, dtype, count))
                return storages[key]

            return self._unpickle(io.BytesIO(archive.read(data)), load)

    def plain(self, stream: BinaryIO) -> Any:
        """Read the legacy layout (before torch 1.6): five pickles in sequence, then the storages.

        A file with one pickle of numpy arrays (detectron2's model zoos) is read, too.

        Raises:
            CheckpointError: The file is neither, or is damaged.
        """
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        storages: dict[str, Storage] = {}
        remaining = size  # bytes that storages may still claim; stops allocation bombs

        def load(tag: Any) -> Storage:
            nonlocal remaining
            dtype, key, count = _storage_tag(tag)
            if key not in storages:
                remaining -= count * dtype.itemsize
                if remaining < 0:
                    raise CheckpointError("its storages are larger than the file")
                storages[key] = Storage(torch.empty(count, dtype=dtype))
            return storages[key]

        first = self._unpickle(stream, load)
        if type(first) is dict and stream.tell() == size:  # one pickle of arrays
            return first
        if first != _MAGIC:
            raise CheckpointError("it is no torch checkpoint (a bare pickle, or another format)")
        self._unpickle(stream, load)  # version of the protocol
        self._unpickle(stream, load)  # integer sizes of the machine
        root = self._unpickle(stream, load)
        for key in self._unpickle(stream, load):
            target = storages[key].data
            count = int.from_bytes(stream.read(8), "little")
            raw = stream.read(count * target.element_size())  # checked by _numbers
            target.copy_(_numbers(raw, target.dtype, target.numel()))
        return root

    def _unpickle(self, stream: BinaryIO, load: Callable[[Any], Storage]) -> Any:
        return _SafeUnpickler(stream, self._find, load).load()


class _SafeUnpickler(pickle.Unpickler):
    """Unpickler whose classes (``find``) and storages (``load``) come from two functions only."""

    def __init__(
        self, stream: BinaryIO, find: Callable[[str, str], Any], load: Callable[[Any], Storage]
    ) -> None:
        # The encoding of texts that Python 2 wrote; the default is ASCII.
        super().__init__(stream, encoding="utf-8")
        self._find, self._load = find, load

    def find_class(self, module: str, name: str) -> Any:
        return self._find(module, name)

    def persistent_load(self, tag: Any) -> Storage:
        return self._load(tag)


def _storage_tag(tag: Any) -> tuple[torch.dtype, str, int]:
    """Return dtype, key and count of a ``("storage", type, key, device, count, ...)`` tag."""
    valid = (
        isinstance(tag, tuple)
        and len(tag) >= 5
        and tag[0] == "storage"
        and isinstance(tag[1], _StorageType)
        and isinstance(tag[2], str)
        and type(tag[4]) is int
        and tag[4] >= 0
        and "/" not in tag[2]
    )
    if not valid:
        raise CheckpointError(
            "it describes a storage in an unknown form (a module that an old torch saved, or a "
            "damaged file); save model.state_dict() instead"
        )
    return tag[1].dtype, tag[2], tag[4]


def _numbers(raw: bytes, dtype: torch.dtype, count: int) -> Tensor:
    """Return the values of a storage as a flat tensor [count]."""
    if len(raw) != count * dtype.itemsize:
        raise CheckpointError(
            f"a storage has {len(raw)} bytes, but {count} values of {dtype} need "
            f"{count * dtype.itemsize}: the file is cut short or damaged"
        )
    if not count:  # frombuffer needs at least one byte
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype)


def _check_entries(archive: zipfile.ZipFile, base: str) -> None:
    """Refuse entries that can grow (compressed, overlapping) and foreign byte orders.

    Only the entries that are read are checked: a TorchScript archive also holds compressed code.
    """
    checked = (f"{base}data.pkl", f"{base}byteorder")
    entries = [
        entry
        # Of entries with one name, archive.read takes the last, as this dict does.
        for entry in {entry.filename: entry for entry in archive.infolist()}.values()
        if entry.filename in checked or entry.filename.startswith(f"{base}data/")
    ]
    total = sum(entry.file_size for entry in entries)
    if total > (archive.fp.seek(0, io.SEEK_END) if archive.fp else 0):
        raise CheckpointError("its entries claim more bytes than the file has")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"its entry {entry.filename} is compressed; torch.save never does that"
            )
        if entry.filename == f"{base}data.pkl" and entry.file_size > _MAX_PICKLE:
            raise CheckpointError(f"its data.pkl has {entry.file_size} bytes; refused above 2^28")
    order = f"{base}byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise CheckpointError(
            "it was written on a big-endian machine; save it again on a little-endian one"
        )


def _fresh_dict() -> type:
    """Return a new dict class, so that a pickle cannot change the real ``OrderedDict``."""
    return type("OrderedDict", (dict,), {})


def _fresh_module() -> type:
    """Return a class for the modules of a TorchScript archive: it keeps attributes, no code."""

    def set_state(self: dict[Any, Any], state: Any = None) -> None:
        if isinstance(state, dict):
            dict.update(self, dict.items(state))

    return type("ScriptModule", (dict,), {"__setstate__": set_state})


def _placeholder(key: str) -> type:
    """Return a class that accepts all arguments, keeps nothing, and does nothing."""

    def accept(self: Any, *args: Any, **kwargs: Any) -> None:
        return None

    def make(cls: type, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)

    names = ("__init__", "__setstate__", "__setitem__", "__call__")
    methods = dict.fromkeys((*names, "append", "extend", "add", "update"), accept)
    return type(
        key.rpartition(".")[2] or "placeholder",
        (),
        {"__new__": make, "__hash__": object.__hash__, **methods},
    )
