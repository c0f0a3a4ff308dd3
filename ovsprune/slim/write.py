"""Write a slim checkpoint atomically (see :mod:`ovsprune.core.files`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ovsprune.core import files
from ovsprune.slim import config
from ovsprune.slim.check import check_mask, check_tensors
from ovsprune.slim.read import describe_files, read_spec
from ovsprune.slim.spec import CARD, CONFIG, MASK, MODEL, SlimSpec

__all__ = ["check_output", "save_tensors", "write"]


def write(
    output: str | os.PathLike[str],
    spec: SlimSpec,
    tensors: Mapping[str, Tensor],
    mask: Mapping[str, Tensor],
    *,
    card: str,
    overwrite: bool = False,
) -> Path:
    """Write a slim checkpoint atomically: completely, or not at all.

    Args:
        output: The directory to create.
        spec: Content of ``config.json``; ``files`` is filled in here.
        tensors: Tensors of the tower with the prefix ``visual.``, and those of the text tower.
        mask: Layer name to int64 [kept], indices of units of the base model.
        card: Text of the model card, ``README.md``.
        overwrite: Replace an existing slim checkpoint.

    Returns:
        The directory.

    Raises:
        OutputError: ``output`` exists (and ``overwrite`` is false, or it is no slim checkpoint),
            or cannot be written, for example because the disk is full. Nothing was changed.
        CheckpointError: ``spec``, ``mask`` and ``tensors`` are inconsistent.
    """
    path = check_output(output, overwrite=overwrite)
    check_mask(spec, mask, "the mask to be written")
    check_tensors(spec, tensors, "the tensors to be written")
    # Nothing may be written that this version cannot read.
    config.parse(config.dump(spec), "the config to be written")
    with files.staged(path) as scratch:
        save_tensors(tensors, scratch / MODEL)
        save_tensors(mask, scratch / MASK)
        listed = replace(spec, files=describe_files(scratch, (MODEL, MASK)))
        (scratch / CONFIG).write_text(config.dump(listed), encoding="utf-8")
        (scratch / CARD).write_text(card, encoding="utf-8")
    return path


def check_output(output: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Check that a slim checkpoint may be written to ``output``; return the resolved path.

    Call this before long work.

    Raises:
        OutputError: The path exists and ``overwrite`` is false, or overwriting it would delete
            files that do not belong to a slim checkpoint.
    """
    return files.check_output(
        output,
        overwrite=overwrite,
        kind="a slim checkpoint",
        files=lambda path: {CONFIG, MODEL, MASK, CARD, *read_spec(path).files},
    )


def save_tensors(
    tensors: Mapping[str, Tensor], file: Path, header: tuple[str, str] = ("format", "pt")
) -> None:
    """Write a safetensors file; equal tensors give equal bytes.

    Args:
        tensors: On any device, contiguous or not, sharing memory or not.
        file: File to write.
        header: Key and value of the header's metadata; a single pair, because safetensors does not
            fix the order of several.

    Raises:
        OSError: The file could not be written; a SafetensorError has the same reason.
    """
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    # Sorted: the order of a dict must not change the bytes of the file.
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        storage = tensor.untyped_storage()
        # safetensors refuses tensors that share memory or use only a part of it
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    # An ordinary file has the mode that the umask gives; safetensors ignores the umask.
    file.touch()
    mode = file.stat().st_mode
    save_file(plain, file, metadata=dict([header]))
    file.chmod(mode)  # safetensors creates files that only their owner can read
