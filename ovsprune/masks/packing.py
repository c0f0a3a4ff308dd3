"""Masks as packed bits: eight entries per byte, row-major, the first in the lowest bit."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ovsprune.core.errors import CheckpointError
from ovsprune.slim import fields
from ovsprune.slim.write import save_tensors

__all__ = ["is_packed", "pack", "read_packed", "save_packed", "unpack"]

_HEADER = "ovsprune-masks"
_VERSION = 1


def pack(mask: Tensor) -> Tensor:
    """Pack a bool mask of any shape, n entries, into uint8 [ceil(n / 8)]; padding bits are 0.

    >>> pack(torch.tensor([True, False, True])).tolist()
    [5]
    """
    flat = mask.detach().cpu().reshape(-1).to(torch.uint8)
    # Pad with zeros to whole bytes.
    flat = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(-1, 8)  # [bytes, 8]
    packed = torch.zeros(len(flat), dtype=torch.uint8)
    for bit in range(8):
        packed |= flat[:, bit] << bit  # the first entry gets the lowest bit
    return packed


def unpack(packed: Tensor, shape: Sequence[int], where: str) -> Tensor:
    """Invert :func:`pack`.

    Args:
        packed: uint8 [ceil(n / 8)].
        shape: Shape of the mask, n entries.
        where: Description of ``packed``, for messages.

    Raises:
        CheckpointError: ``packed`` has another length or dtype, or padding bits that are not 0.
    """
    count = math.prod(shape)
    size = -(-count // 8)  # rounded up
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (size,):
        raise CheckpointError(
            f"{where} is {packed.dtype} {tuple(packed.shape)}, expected torch.uint8 ({size},) for "
            f"the bits of a mask of shape {tuple(shape)}; the file was edited or damaged: copy it "
            "again"
        )
    bits = torch.stack([(packed >> bit) & 1 for bit in range(8)], dim=1)  # [bytes, 8]
    bits = bits.reshape(-1).bool()
    # Padding bits must be 0, so that a mask has a single valid encoding.
    if bits[count:].any():
        raise CheckpointError(
            f"{where} has bits beyond the end of a mask of shape {tuple(shape)}; the file was "
            "edited or damaged: copy it again"
        )
    return bits[:count].reshape(tuple(shape))


def save_packed(masks: Mapping[str, Tensor], file: Path) -> None:
    """Write masks as packed bits; equal masks give equal bytes.

    Raises:
        OSError: The file could not be written; a SafetensorError has the same reason.
    """
    shapes = {name: list(masks[name].shape) for name in sorted(masks)}
    header = {"format_version": _VERSION, "shapes": shapes}
    packed = {name: pack(mask) for name, mask in masks.items()}
    save_tensors(packed, file, (_HEADER, json.dumps(header, separators=(",", ":"))))


def read_packed(file: Path) -> dict[str, Tensor]:
    """Read masks from a file of packed bits.

    Raises:
        CheckpointError: The file is damaged or has an unknown version.
    """
    try:
        with safe_open(str(file), framework="pt") as content:
            header = (content.metadata() or {}).get(_HEADER)
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{file} is not a valid safetensors file ({error}); copy it again"
        ) from error
    if header is None:
        raise CheckpointError(f"{file} is not a file of masks: its header has no entry {_HEADER!r}")
    shapes = _shapes(header, f"{file}: {_HEADER}")
    if set(shapes) != set(tensors):
        unmatched = sorted(set(shapes) ^ set(tensors))[0]
        raise CheckpointError(f"{file}: {unmatched} has no bits or no shape; copy it again")
    return {name: unpack(tensors[name], shapes[name], f"{file}: {name}") for name in shapes}


def is_packed(path: Path) -> bool:
    """Return True if ``path`` is a file of packed bits, valid or damaged."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(str(path), framework="pt") as content:
            return _HEADER in (content.metadata() or {})
    except (SafetensorError, OSError):
        return False  # read_foreign will raise an error that explains the problem


def _shapes(document: str, at: str) -> dict[str, tuple[int, ...]]:
    """Parse the shapes in the header; ``at`` names the header in messages."""
    data = fields.record(fields.parse(document, at), at, ("format_version", "shapes"))
    version = fields.integer(data["format_version"], f"{at}: format_version", 1)
    if version != _VERSION:
        raise CheckpointError(
            f"{at}: format_version is {version}, but this version of ovsprune reads {_VERSION}; "
            "install a newer version"
        )
    shapes = fields.mapping(data["shapes"], f"{at}: shapes")
    return {
        fields.text(name, f"{at}: a name", fields.DOTTED): fields.array(
            shape, f"{at}: shapes.{name}", fields.integer
        )
        for name, shape in shapes.items()
    }
