"""Unstructured checkpoints: a directory with config, masks, and masked weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ovsprune.core.errors import CheckpointError
from ovsprune.core.files import check_output, staged
from ovsprune.masks.packing import read_packed, save_packed
from ovsprune.masks.spec import FORMAT, MASKS, MaskedSpec
from ovsprune.slim import fields
from ovsprune.slim.check import TOWER
from ovsprune.slim.read import TowerTensors, check_files, describe_files, read_config, read_tensors
from ovsprune.slim.spec import CARD, CONFIG, MODEL
from ovsprune.slim.write import save_tensors

__all__ = [
    "MaskedCheckpoint",
    "check_place",
    "is_unstructured",
    "read_unstructured",
    "write_unstructured",
]


@dataclass(frozen=True, eq=False)
class MaskedCheckpoint(TowerTensors):
    """Unstructured checkpoint in memory, on the CPU.

    Attributes:
        path: The directory.
        spec: Content of ``config.json``.
        masks: Map of parameter name in the tower to bool of its shape, True where it is kept.
        tensors: Tensors of ``model.safetensors`` by name: names and shapes of the dense model, with
            the prefix ``visual.`` for the image tower.
    """

    path: Path
    spec: MaskedSpec
    masks: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]


def write_unstructured(
    output: str | os.PathLike[str],
    spec: MaskedSpec,
    tensors: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    card: str,
    overwrite: bool = False,
) -> Path:
    """Write an unstructured checkpoint atomically: completely, or not at all.

    Args:
        output: The directory to create.
        spec: Content of ``config.json``; ``files`` is filled in here.
        tensors: Tensors of the tower with the prefix ``visual.``, and those of the text tower.
        masks: Map of parameter name in the tower to bool of its shape.
        card: Text of the card, ``README.md``.
        overwrite: Replace an existing unstructured checkpoint.

    Raises:
        OutputError: ``output`` exists, or cannot be written. Nothing was changed.
        CheckpointError: ``spec``, ``masks`` and ``tensors`` are inconsistent.
    """
    path = check_place(output, overwrite=overwrite)
    _check(spec, masks, tensors, "the result to be written")
    # Nothing may be written that this version cannot read.
    MaskedSpec.from_json(spec.to_json(), "the config to be written")
    with staged(path) as scratch:  # a new directory, renamed to the path when it is complete
        save_tensors(tensors, scratch / MODEL)
        save_packed(masks, scratch / MASKS)
        listed = replace(spec, files=describe_files(scratch, (MODEL, MASKS)))
        (scratch / CONFIG).write_text(listed.to_json(), encoding="utf-8")
        (scratch / CARD).write_text(card, encoding="utf-8")
    return path


def check_place(output: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Return the path of ``output`` if an unstructured checkpoint may be written there.

    Raises:
        OutputError: It exists and ``overwrite`` is false, or it contains files that do not belong
            to an unstructured checkpoint.
    """
    return check_output(
        output,
        overwrite=overwrite,
        kind="an unstructured result",
        files=lambda path: {CONFIG, MODEL, MASKS, CARD, *_read_spec(path).files},
    )


def read_unstructured(
    directory: str | os.PathLike[str], *, verify: bool = True
) -> MaskedCheckpoint:
    """Read an unstructured checkpoint.

    Args:
        directory: Directory that ``ovsprune prune --method imp`` wrote.
        verify: Also compare every file's SHA-256 with the config.

    Raises:
        CheckpointError: A file is missing, damaged, or inconsistent with the others.
    """
    path = Path(directory)
    spec = _read_spec(path)
    check_files(path, spec.files, (MODEL, MASKS), verify=verify)
    masks, tensors = read_packed(path / MASKS), read_tensors(path / MODEL)
    _check(spec, masks, tensors, str(path))
    return MaskedCheckpoint(path=path, spec=spec, masks=masks, tensors=tensors)


def is_unstructured(directory: Path) -> bool:
    """Return True if the config of a directory has the format of unstructured checkpoints."""
    try:
        document, file = read_config(directory)
        data = fields.parse(document, str(file))
    except CheckpointError:
        return False
    return isinstance(data, dict) and data.get("format") == FORMAT


def _read_spec(path: Path) -> MaskedSpec:
    """Read ``config.json``."""
    document, file = read_config(path)
    return MaskedSpec.from_json(document, str(file))


def _check(
    spec: MaskedSpec, masks: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str
) -> None:
    """Check that masks and weights match the spec; ``source`` is their origin, for messages."""
    remedy = "copy it again, or prune again"
    # symmetric difference: names that only one of the two has
    unmatched = sorted({w.name for w in spec.weights} ^ set(masks))
    if unmatched:
        raise CheckpointError(f"{source}: {unmatched[0]} is missing in the config or in the masks")
    for weight in spec.weights:
        mask, tensor = masks[weight.name], tensors.get(f"{TOWER}{weight.name}")
        zeros = mask.numel() - int(mask.sum())
        if tuple(mask.shape) != weight.shape or zeros != weight.zeros:
            raise CheckpointError(
                f"{source}: the mask of {weight.name} has shape {tuple(mask.shape)} and {zeros} "
                f"zeros, but the config says {weight.shape} and {weight.zeros}; {remedy}"
            )
        if tensor is None or tuple(tensor.shape) != weight.shape:
            has = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
            raise CheckpointError(
                f"{source}: the weight {TOWER}{weight.name} {has}, expected {weight.shape}; "
                f"{remedy}"
            )
        # nan != 0 is true, so nan at a removed position is refused, too.
        if bool((tensor.detach().cpu()[~mask.cpu()] != 0).any()):
            raise CheckpointError(
                f"{source}: the weight {TOWER}{weight.name} is not zero at every position that its "
                f"mask removes; {remedy}"
            )
    missing = sorted(n for n in spec.base.tensors if f"{TOWER}{n}" not in tensors)
    if missing:
        raise CheckpointError(f"{source}: the tensor {TOWER}{missing[0]} is missing; {remedy}")
