"""Writing a slim checkpoint: the whole of it or nothing.

Everything goes to a temporary directory beside the output, is flushed to the disk, and is renamed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ovsprune.core.errors import CheckpointError, OutputError
from ovsprune.slim import config, swap
from ovsprune.slim.check import check_mask, check_tensors
from ovsprune.slim.read import file_digest, read_spec
from ovsprune.slim.spec import CARD, CONFIG, MASK, MODEL, FileSpec, SlimSpec

__all__ = ["check_output", "save_tensors", "staged", "staged_file", "write"]

_OWN = (CONFIG, MODEL, MASK, CARD)


def write(
    output: str | os.PathLike[str],
    spec: SlimSpec,
    tensors: Mapping[str, Tensor],
    mask: Mapping[str, Tensor],
    *,
    card: str,
    overwrite: bool = False,
) -> Path:
    """Write a slim checkpoint, so that afterwards there is all of it or nothing new.

    Args:
        output: The directory to make.
        spec: What ``config.json`` says; ``files`` is filled in here.
        tensors: The tower's tensors with the prefix ``visual.``, and the text tower's.
        mask: Layer name to int64 [kept], in the base model's coordinates.
        card: Text of the model card, ``README.md``.
        overwrite: Swap an existing slim checkpoint for the new one.

    Returns:
        The directory.

    Raises:
        OutputError: ``output`` exists (and ``overwrite`` is false, or it is no slim checkpoint),
            or it cannot be written, for example because the disk is full. Nothing was changed.
        CheckpointError: ``spec``, ``mask`` and ``tensors`` do not fit each other.
    """
    path = check_output(output, overwrite=overwrite)
    check_mask(spec, mask, "the mask to be written")
    check_tensors(spec, tensors, "the tensors to be written")
    config.parse(config.dump(spec), "the config to be written")
    with staged(path) as scratch:
        _fill(scratch, spec, tensors, mask, card)
    return path


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A new directory to fill, which takes the place of ``path`` at the end, whole and durable.

    Args:
        path: Where it goes; a directory that is there is swapped out, so ask first whether it may.

    Yields:
        The directory to fill, on the same file system.

    Raises:
        OutputError: Something could not be written, here or in the body. Nothing was changed.
    """
    try:
        with _parents(path.parent), _scratch(path) as scratch:
            yield scratch
            for file in (*scratch.iterdir(), scratch):
                swap.flush(file)
            swap.into_place(scratch, path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path} could not be written: {_reason(error)}") from error


@contextlib.contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A new file to fill, which takes the place of ``path`` at the end, whole and durable.

    Yields:
        The file to fill; it does not exist yet.

    Raises:
        OutputError: Something could not be written, here or in the body. Nothing was changed.
    """
    try:
        with _parents(path.parent), _scratch(path) as scratch:
            new = scratch / path.name
            yield new
            swap.flush(new)
            os.replace(new, path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path} could not be written: {_reason(error)}") from error


def check_output(
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    files: Callable[[Path], Collection[str]] = lambda path: {*_OWN, *read_spec(path).files},
) -> Path:
    """The path that ``output`` means, if a checkpoint may be written there; asked before long work.

    Args:
        output: The directory to make.
        overwrite: Whether a checkpoint that is there may go.
        files: Names of the files of the checkpoint in a directory; raises CheckpointError if there
            is none. By default those of a slim checkpoint.

    Raises:
        OutputError: It exists and ``overwrite`` is false, or it is something that an overwrite
            would lose.
    """
    path = Path(os.path.realpath(output))
    if not os.path.lexists(path):
        return path
    if not overwrite:
        raise OutputError(
            f"{path} exists already; choose another output, or pass --overwrite (overwrite=True)"
        )
    if not path.is_dir():
        raise OutputError(f"{path} is a file, not a slim checkpoint; choose another output")
    try:
        entries = {entry.name for entry in path.iterdir()}
    except OSError as error:
        raise OutputError(
            f"{path} cannot be looked into ({error.strerror}); choose another output"
        ) from error
    if not entries:
        return path
    try:
        known = set(files(path))
    except CheckpointError as error:
        raise OutputError(
            f"{path} is not overwritten, because it is no slim checkpoint ({error}); choose "
            "another output, or delete it yourself"
        ) from error
    if entries - known:
        raise OutputError(
            f"{path} is not overwritten, because it holds files that are no part of the "
            f"checkpoint ({', '.join(sorted(entries - known)[:5])}); move them or choose another "
            "output"
        )
    return path


def _fill(
    scratch: Path,
    spec: SlimSpec,
    tensors: Mapping[str, Tensor],
    mask: Mapping[str, Tensor],
    card: str,
) -> None:
    save_tensors(tensors, scratch / MODEL)
    save_tensors(mask, scratch / MASK)
    files = {
        name: FileSpec(file_digest(scratch / name), (scratch / name).stat().st_size)
        for name in (MODEL, MASK)
    }
    (scratch / CONFIG).write_text(config.dump(replace(spec, files=files)), encoding="utf-8")
    (scratch / CARD).write_text(card, encoding="utf-8")


def save_tensors(
    tensors: Mapping[str, Tensor], file: Path, header: tuple[str, str] = ("format", "pt")
) -> None:
    """Write a safetensors file; equal tensors give equal bytes.

    Args:
        tensors: On any device, contiguous or not, sharing memory or not.
        file: Where to.
        header: Key and value of the header's metadata; a single one, since the order of several is
            not fixed.

    Raises:
        OSError: It could not be written; SafetensorError likewise.
    """
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        storage = tensor.untyped_storage()
        # safetensors refuses tensors that share or only partly use their memory
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    file.touch()
    mode = file.stat().st_mode
    save_file(plain, file, metadata=dict([header]))
    file.chmod(mode)  # safetensors leaves a file that only its owner can read


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A directory beside ``path`` that is gone at the end, unless it was renamed."""
    scratch = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _parents(parent: Path) -> Iterator[None]:
    """Make ``parent`` and those above it; if the body fails, remove those that were made."""
    made = []
    missing = parent
    while not missing.exists():
        made.append(missing)
        missing = missing.parent
    parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for directory in made:
            with contextlib.suppress(OSError):
                directory.rmdir()
        raise


def _reason(error: Exception) -> str:
    full = "free some space or choose an output on another disk; nothing was left behind"
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"the disk is full ({error.strerror}); {full}"
        return f"{error.strerror or error}; choose another output, nothing was left behind"
    if "os error 28" in str(error):  # safetensors wraps the system's error in its own
        return f"the disk is full ({error}); {full}"
    return f"{error}; choose another output, nothing was left behind"
