"""A pickle machine with nothing to call, for :mod:`ovsprune.core.foreign`.

What it hands to a pickle either describes a tensor or does nothing, is made anew for every file,
and cannot be changed from inside the pickle in a way that outlives the reading.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ovsprune.core.errors import CheckpointError
from ovsprune.core.inert_arrays import Arrays
from ovsprune.core.sketch import Deaf, Sketch, Storage, view

__all__ = ["Reader", "Sketch"]

_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_PICKLE = 1 << 28
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


class _Tag(Deaf):
    """A storage type by its number format."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class Reader:
    """One reading of one file; whatever a hostile file does to its answers ends with it."""

    def __init__(self) -> None:
        self.asked: set[str] = set()
        self.scripted = False
        """Whether the file is a TorchScript archive, whose modules are dicts of attributes here."""
        self._answers: dict[str, Any] = {}
        self._arrays = Arrays()

    def find(self, module: str, name: str) -> Any:
        """What the pickle gets for ``module.name``: ours, or something inert."""
        key = f"{module}.{name}"
        if key not in self._answers:
            self._answers[key] = self._answer(module, name, key)
        return self._answers[key]

    def _answer(self, module: str, name: str, key: str) -> Any:
        if key == "collections.OrderedDict":
            return _fresh_dict()
        if module == "torch" and name in _DTYPES:
            return _Tag(_DTYPES[name])
        if key in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
            return lambda storage, offset, size, stride, *rest: view(storage, offset, size, stride)
        if key == "torch._utils._rebuild_parameter":
            return lambda data, *rest: data
        if key == "torch.Size":
            return lambda sizes=(): tuple(sizes)
        if (array := self._arrays.answer(key)) is not None:
            return array
        if module.split(".")[0] == "__torch__":
            self.scripted = True
            return _fresh_module()
        self.asked.add(key)
        return _placeholder(key)

    def zip(self, stream: BinaryIO) -> Any:
        """The zip layout: one pickle, one stored entry a storage."""
        with zipfile.ZipFile(stream) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            pickles = [n for n in entries if n.rpartition("/")[2] == "data.pkl"]
            if len(pickles) != 1:
                kind = "a TorchScript or other archive" if pickles else "no torch checkpoint"
                raise CheckpointError(f"the zip holds {len(pickles)} data.pkl: {kind}")
            root = pickles[0].rpartition("/")[0]
            base = f"{root}/" if root else ""
            _check_entries(entries.values(), base, archive)
            storages: dict[str, Storage] = {}

            def load(tag: Any) -> Storage:
                dtype, key, count = _storage_tag(tag)
                if key not in storages:
                    raw = archive.read(f"{base}data/{key}")
                    storages[key] = Storage(_numbers(raw, dtype, count))
                return storages[key]

            return self._unpickle(io.BytesIO(archive.read(pickles[0])), load)

    def plain(self, stream: BinaryIO) -> Any:
        """The layout before torch 1.6: five pickles one after another, then the storages.

        Or one pickle of numpy's arrays, as detectron2's model zoos have it.
        """
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        storages: dict[str, Storage] = {}
        room = size

        def load(tag: Any) -> Storage:
            nonlocal room
            dtype, key, count = _storage_tag(tag)
            if key not in storages:
                room -= count * dtype.itemsize
                if room < 0:
                    raise CheckpointError("its storages are larger than the file")
                storages[key] = Storage(torch.empty(count, dtype=dtype))
            return storages[key]

        first = self._unpickle(stream, load)
        if type(first) is dict and stream.tell() == size:
            return first
        if first != _MAGIC:
            raise CheckpointError("it is no torch checkpoint (a bare pickle, or another format)")
        self._unpickle(stream, load)
        self._unpickle(stream, load)
        root = self._unpickle(stream, load)
        for key in self._unpickle(stream, load):
            target = storages[key].data
            count = int.from_bytes(stream.read(8), "little")
            raw = stream.read(count * target.element_size())
            target.copy_(_numbers(raw, target.dtype, target.numel()))
        return root

    def _unpickle(self, stream: BinaryIO, load: Callable[[Any], Storage]) -> Any:
        return _Unpickler(stream, self.find, load).load()


class _Unpickler(pickle.Unpickler):
    """The pickle machine with its doors shut."""

    def __init__(
        self,
        stream: BinaryIO,
        find: Callable[[str, str], Any],
        load: Callable[[Any], Storage],
    ) -> None:
        super().__init__(stream, encoding="utf-8")
        self._find, self._load = find, load

    def find_class(self, module: str, name: str) -> Any:
        return self._find(module, name)

    def persistent_load(self, tag: Any) -> Storage:
        return self._load(tag)


def _storage_tag(tag: Any) -> tuple[torch.dtype, str, int]:
    """Check a ``("storage", type, key, device, count, ...)`` tag."""
    good = (
        isinstance(tag, tuple)
        and len(tag) >= 5
        and tag[0] == "storage"
        and isinstance(tag[1], _Tag)
        and isinstance(tag[2], str)
        and type(tag[4]) is int
        and tag[4] >= 0
        and "/" not in tag[2]
    )
    if not good:
        raise CheckpointError(
            "it describes a storage in a way that is not known (a whole module saved by an old "
            "torch, or damage); save model.state_dict() instead"
        )
    return tag[1].dtype, tag[2], tag[4]


def _numbers(raw: bytes, dtype: torch.dtype, count: int) -> Tensor:
    if len(raw) != count * dtype.itemsize:
        raise CheckpointError(
            f"a storage has {len(raw)} bytes where {count} values of {dtype} need "
            f"{count * dtype.itemsize}: the file is cut short or damaged"
        )
    if not count:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype)


def _check_entries(entries: Iterable[zipfile.ZipInfo], base: str, archive: zipfile.ZipFile) -> None:
    """Refuse what can grow (compressed, overlapping) and what would be read the wrong way.

    Only of the entries that are read: a TorchScript archive has its code beside them, compressed.
    """
    read = (f"{base}data.pkl", f"{base}byteorder")
    entries = [e for e in entries if e.filename in read or e.filename.startswith(f"{base}data/")]
    total = sum(entry.file_size for entry in entries)
    if total > (archive.fp.seek(0, io.SEEK_END) if archive.fp else 0):
        raise CheckpointError("its entries claim more bytes than the file has")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"its entry {entry.filename} is compressed, as torch never does")
        if entry.filename == f"{base}data.pkl" and entry.file_size > _MAX_PICKLE:
            raise CheckpointError(f"its data.pkl has {entry.file_size} bytes; refused above 2^28")
    order = f"{base}byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise CheckpointError("it was written on a big-endian machine; save it again on this kind")


def _fresh_dict() -> type:
    return type("OrderedDict", (dict,), {})


def _fresh_module() -> type:
    """A module of a TorchScript archive: its attributes, and nothing of its code."""

    def hold(self: dict[Any, Any], state: Any = None) -> None:
        if isinstance(state, dict):
            dict.update(self, dict.items(state))

    return type("ScriptModule", (dict,), {"__setstate__": hold})


def _placeholder(key: str) -> type:
    """A class that takes anything, keeps nothing, and does nothing."""

    def accept(self: Any, *args: Any, **kwargs: Any) -> None:
        return None

    def make(cls: type, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)

    names = ("__init__", "__setstate__", "__setitem__", "__call__")
    silent = dict.fromkeys((*names, "append", "extend", "add", "update"), accept)
    return type(
        key.rpartition(".")[2] or "inert",
        (),
        {"__new__": make, "__hash__": object.__hash__, **silent},
    )
