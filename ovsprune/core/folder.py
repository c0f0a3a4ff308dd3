"""Tensors out of a folder as ``save_pretrained`` writes it: weights in one file or in several."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ovsprune.core.errors import CheckpointError
from ovsprune.core.foreign import Foreign, read_foreign

__all__ = ["files_beside", "read_folder"]

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def read_folder(path: Path) -> Foreign:
    """The tensors of ``model.safetensors`` or ``pytorch_model.bin``, or of their parts.

    Raises:
        CheckpointError: The folder holds neither, or a file is missing or damaged.
    """
    for name in _WEIGHTS:
        if (path / name).is_file():
            return read_foreign(path / name)
        index = path / f"{name}.index.json"
        if index.is_file():
            parts = [read_foreign(path / part) for part in _parts(index)]
            tensors: dict[str, Tensor] = {}
            for part in parts:
                tensors |= part.tensors
            inert = sorted({name for part in parts for name in part.inert})
            return Foreign(path, tensors, None, "", (), tuple(inert))
    raise CheckpointError(
        f"{path} holds neither {' nor '.join(_WEIGHTS)} (nor an index of their parts); name the "
        "folder that save_pretrained wrote, or the file of the framework's weights"
    )


def files_beside(checkpoint: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Content of those of ``names`` that lie in the folder ``checkpoint``, or beside the file."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def _parts(index: Path) -> list[str]:
    """Names of the files that an index lists, all of them in its own folder."""
    try:
        listed = json.loads(index.read_text("utf-8"))["weight_map"].values()
        names = sorted(set(listed))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        names = []
    if not names or any(not isinstance(n, str) or Path(n).name != n for n in names):
        raise CheckpointError(f"{index} lists no files of weights beside it; copy it again")
    return names
