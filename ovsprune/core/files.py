"""Atomic writes: an output file or directory is complete, or it is not there.

Everything is written to a scratch directory next to the output, flushed to the disk, and renamed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from ovsprune.core.errors import CheckpointError, OutputError

__all__ = [
    "check_output",
    "flush",
    "staged",
    "staged_file",
    "write_text",
]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_REMEDY = "choose another output"


def check_output(
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    kind: str,
    files: Callable[[Path], Collection[str]],
) -> Path:
    """Check that an output directory may be written; call this before long work.

    Args:
        output: The directory to make.
        overwrite: Allow an existing directory of this kind to be replaced.
        kind: Name of what is written, for messages (``"a slim checkpoint"``).
        files: Return the names of the files that belong to the output in a directory. Raise
            CheckpointError if the directory holds no such output.

    Returns:
        The absolute path, with links resolved.

    Raises:
        OutputError: The path exists and ``overwrite`` is false, or overwriting it would delete
            files that are not part of such an output.
    """
    # With links resolved: renaming to a link would replace the link, not the directory behind it.
    path = Path(os.path.realpath(output))
    if not os.path.lexists(path):
        return path
    if not overwrite:
        raise OutputError(
            f"{path} exists already; choose another output, or pass --overwrite (overwrite=True)"
        )
    if not path.is_dir():
        raise OutputError(f"{path} is a file, not {kind}; {_REMEDY}")
    try:
        entries = {entry.name for entry in path.iterdir()}
    except OSError as error:
        raise OutputError(f"{path} cannot be listed ({error.strerror}); {_REMEDY}") from error
    if not entries:
        return path
    try:
        known = set(files(path))
    except CheckpointError as error:
        raise OutputError(
            f"{path} is not overwritten, because it is not {kind} ({error}); choose another "
            "output, or delete it yourself"
        ) from error
    if entries - known:
        raise OutputError(
            f"{path} is not overwritten, because it holds files that are not part of {kind} "
            f"({', '.join(sorted(entries - known)[:5])}); move them, choose another output, or "
            "delete the directory yourself"
        )
    return path


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a new directory to fill; it replaces ``path`` when the block ends without an error.

    An existing directory is replaced, so call :func:`check_output` first.

    Raises:
        OutputError: A file could not be written, here or in the block. Nothing was changed.
    """
    with _reported(str(path), _REMEDY), _parents(path.parent), _scratch(path) as scratch:
        yield scratch
        for file in (*scratch.iterdir(), scratch):  # the directory too: it holds the names
            flush(file)
        move_into_place(scratch, path)


@contextlib.contextmanager
def staged_file(path: Path, *, what: str = "", remedy: str = _REMEDY) -> Iterator[Path]:
    """Yield the path of a new file to write; it replaces ``path`` when the block ends.

    Args:
        path: The output.
        what: Name of the output in messages; the path by default.
        remedy: Advice in messages, where the disk is not full.

    Raises:
        OutputError: The file could not be written, here or in the block. Nothing was changed.
    """
    with _reported(what or str(path), remedy), _parents(path.parent), _scratch(path) as scratch:
        new = scratch / path.name
        yield new
        flush(new)  # otherwise a crash could leave an empty file under the final name
        os.replace(new, path)


def write_text(path: Path, text: str, *, what: str = "", remedy: str = _REMEDY) -> None:
    """Write a text file in UTF-8, complete or not at all; see :func:`staged_file`.

    Raises:
        OutputError: The file could not be written. Nothing was changed.
    """
    with staged_file(path, what=what, remedy=remedy) as new:
        new.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Have the system write a file or directory to its disk."""
    handle = os.open(path, os.O_RDONLY)  # unlike open(), this opens directories
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def move_into_place(new: Path, path: Path) -> None:
    """Move the directory ``new`` to ``path``, and delete a directory that was there.

    On Linux the two are exchanged in one step, so a reader finds one of them complete at any time.
    Elsewhere the old directory is renamed first, and renamed back if the move fails.
    """
    if not path.exists():
        new.rename(path)
    elif _exchange(new, path):
        shutil.rmtree(new, ignore_errors=True)
    else:
        old = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.old"
        path.rename(old)
        try:
            new.rename(path)
        except BaseException:  # also when the user interrupts
            old.rename(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    # The move succeeded. If this flush fails, only its durability is up to the system.
    with contextlib.suppress(OSError):
        flush(path.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two paths in one step; False if this system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    # Windows raises TypeError for CDLL(None); macOS and glibc before 2.28 lack the function.
    except (OSError, AttributeError, TypeError):
        return False
    # Linux 3.15 and later, on most file systems.
    paths = os.fsencode(a), os.fsencode(b)
    return bool(renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0)


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """Make a directory next to ``path``, and delete it at the end unless it was renamed."""
    # Next to the output, because a rename works within one file system only.
    scratch = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _parents(parent: Path) -> Iterator[None]:
    """Make ``parent`` and the directories above it; remove the new ones if the block fails."""
    made = []  # innermost first
    missing = parent
    while not missing.exists():
        made.append(missing)
        missing = missing.parent
    parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for directory in made:
            with contextlib.suppress(OSError):  # not empty: another process uses it
                directory.rmdir()
        raise


@contextlib.contextmanager
def _reported(what: str, remedy: str) -> Iterator[None]:
    """Turn errors of the system and of safetensors into OutputError."""
    try:
        yield
    except _write_errors() as error:
        raise OutputError(f"{what} could not be written: {_reason(error, remedy)}") from error


def _write_errors() -> tuple[type[Exception], ...]:
    from safetensors import SafetensorError  # here, because the command line imports this module

    return OSError, SafetensorError


def _reason(error: Exception, remedy: str) -> str:
    full = f"free some space, or {remedy} on another disk; nothing was left behind"
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"the disk is full ({error.strerror}); {full}"
        return f"{error.strerror or error}; {remedy}, nothing was left behind"
    if "os error 28" in str(error):  # safetensors wraps the system's error in its own
        return f"the disk is full ({error}); {full}"
    return f"{error}; {remedy}, nothing was left behind"
