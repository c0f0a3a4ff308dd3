"""Write a slim checkpoint, complete or not at all (see :mod:`ovsprune.core.files`)."""

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
from ovsprune.slim.read import file_digest, read_spec
from ovsprune.slim.spec import CARD, CONFIG, MASK, MODEL, FileSpec, SlimSpec

__all__ = ["check_output", "save_tensors", "write"]

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
    """Write a slim checkpoint, complete or not at all.

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
            or cannot be written, for example because the disk is full. Nothing was changed.
        CheckpointError: ``spec``, ``mask`` and ``tensors`` do not fit each other.
    """
    path = check_output(output, overwrite=overwrite)
    check_mask(spec, mask, "the mask to be written")
    check_tensors(spec, tensors, "the tensors to be written")
    config.parse(config.dump(spec), "the config to be written")
    with files.staged(path) as scratch:
        _fill(scratch, spec, tensors, mask, card)
    return path


def check_output(output: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Check that a slim checkpoint may be written to ``output``; call this before long work.

    Args:
        output: The directory to make.
        overwrite: Allow an existing slim checkpoint to be replaced.

    Returns:
        The absolute path, with links resolved.

    Raises:
        OutputError: The path exists and ``overwrite`` is false, or overwriting it would delete
            something else.
    """
    return files.check_output(
        output,
        overwrite=overwrite,
        kind="a slim checkpoint",
        files=lambda path: {*_OWN, *read_spec(path).files},
    )


def _fill(
    scratch: Path,
    spec: SlimSpec,
    tensors: Mapping[str, Tensor],
    mask: Mapping[str, Tensor],
    card: str,
) -> None:
    save_tensors(tensors, scratch / MODEL)
    save_tensors(mask, scratch / MASK)
    listed = {
        name: FileSpec(file_digest(scratch / name), (scratch / name).stat().st_size)
        for name in (MODEL, MASK)
    }
    (scratch / CONFIG).write_text(config.dump(replace(spec, files=listed)), encoding="utf-8")
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
