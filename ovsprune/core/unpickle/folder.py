"""Reads tensors from a folder that ``save_pretrained`` wrote: weights in one file or in shards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ovsprune.core.errors import CheckpointError
from ovsprune.core.unpickle.foreign import Foreign, read_foreign

__all__ = ["read_folder", "sibling_files"]

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # safetensors first: it needs no unpickling


def read_folder(path: Path) -> Foreign:
    """Read ``model.safetensors`` or ``pytorch_model.bin``, or the shards of one of them.

    Raises:
        CheckpointError: The folder holds neither, or a file is missing or damaged.
    """
    for name in _WEIGHTS:
        if (path / name).is_file():
            return read_foreign(path / name)
        index = path / f"{name}.index.json"
        if index.is_file():
            shards = [read_foreign(path / shard) for shard in _shards(index)]
            return Foreign(
                path=path,
                tensors={name: t for shard in shards for name, t in shard.tensors.items()},
                container=None,
                prefix="",
                other=(),
                inert=tuple(sorted({name for shard in shards for name in shard.inert})),
            )
    raise CheckpointError(
        f"{path} holds neither {' nor '.join(_WEIGHTS)} (nor an index of their shards); give "
        "the folder that save_pretrained wrote, or the file of the framework's weights"
    )


def sibling_files(checkpoint: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Read the files of ``names`` that exist in the folder of a checkpoint, or next to its file."""
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def _shards(index: Path) -> list[str]:
    """Return the names of the files that an index lists; refuse files outside its folder."""
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        names = []
    # A name with a folder in it could point anywhere on the disk.
    if not names or any(not isinstance(n, str) or Path(n).name != n for n in names):
        raise CheckpointError(f"{index} lists no weight files of its own folder; copy it again")
    return names
