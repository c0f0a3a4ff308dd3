"""Putting a finished directory in its place, durably, and in one step where the system can."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import uuid
from pathlib import Path

__all__ = ["flush", "into_place"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def flush(path: Path) -> None:
    """Have the system write a file or directory to its disk.

    Raises:
        OSError: It could not.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def into_place(new: Path, path: Path) -> None:
    """Move the directory ``new`` to ``path``; a directory that is there goes.

    On Linux the two are exchanged in one step, so that a reader always finds one of them whole.
    Elsewhere the old one steps aside for a moment, and comes back if the move fails.

    Raises:
        OSError: The move failed; ``path`` is as it was.
    """
    if not path.exists():
        new.rename(path)
    elif _exchange(new, path):
        shutil.rmtree(new, ignore_errors=True)
    else:
        aside = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.old"
        path.rename(aside)
        try:
            new.rename(path)
        except BaseException:
            aside.rename(path)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(OSError):  # the move is done; its durability is the system's matter
        flush(path.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two paths in one step; false if this system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    paths = os.fsencode(a), os.fsencode(b)
    return bool(renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0)
