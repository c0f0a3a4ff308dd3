"""An unstructured result on disk: config, masks, and the masked weights in the base's layout."""

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
from ovsprune.slim.read import check_files, file_digest, read_config, read_tensors
from ovsprune.slim.spec import CARD, CONFIG, MODEL, FileSpec
from ovsprune.slim.write import save_tensors

__all__ = [
    "MaskedCheckpoint",
    "check_place",
    "is_unstructured",
    "read_unstructured",
    "write_unstructured",
]


@dataclass(frozen=True, eq=False)
class MaskedCheckpoint:
    """An unstructured result in memory, on the CPU.

    Attributes:
        path: The directory.
        spec: Its ``config.json``.
        masks: Parameter's name in the tower to bool of its shape, True where the weight stays.
        tensors: Every tensor of ``model.safetensors``, by its name there: the dense model's own
            names and shapes, the image tower's behind ``visual.``.
    """

    path: Path
    spec: MaskedSpec
    masks: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]

    def tower(self) -> dict[str, Tensor]:
        """The image tower's tensors by canonical name (without ``visual.``)."""
        return {k[len(TOWER) :]: v for k, v in self.tensors.items() if k.startswith(TOWER)}

    def text(self) -> dict[str, Tensor]:
        """Every other tensor: the text tower and the logit scale; empty if there is none."""
        return {k: v for k, v in self.tensors.items() if not k.startswith(TOWER)}


def write_unstructured(
    output: str | os.PathLike[str],
    spec: MaskedSpec,
    tensors: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    card: str,
    overwrite: bool = False,
) -> Path:
    """Write an unstructured result, complete or not at all.

    Args:
        output: The directory to make.
        spec: What ``config.json`` says; ``files`` is filled in here.
        tensors: The tower's tensors with the prefix ``visual.``, and the text tower's.
        masks: Parameter's name in the tower to bool of its shape.
        card: Text of the card, ``README.md``.
        overwrite: Swap an existing unstructured result for the new one.

    Raises:
        OutputError: ``output`` exists, or cannot be written. Nothing was changed.
        CheckpointError: ``spec``, ``masks`` and ``tensors`` do not fit each other.
    """
    path = check_place(output, overwrite=overwrite)
    _check(spec, masks, tensors, "the result to be written")
    MaskedSpec.from_json(spec.to_json(), "the config to be written")
    with staged(path) as scratch:
        save_tensors(tensors, scratch / MODEL)
        save_packed(masks, scratch / MASKS)
        files = {
            name: FileSpec(file_digest(scratch / name), (scratch / name).stat().st_size)
            for name in (MODEL, MASKS)
        }
        (scratch / CONFIG).write_text(replace(spec, files=files).to_json(), encoding="utf-8")
        (scratch / CARD).write_text(card, encoding="utf-8")
    return path


def check_place(output: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Check that an unstructured result may be written to ``output``; return its full path.

    Raises:
        OutputError: The path exists and ``overwrite`` is false, or overwriting it would delete
            something else.
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
    """Read an unstructured result.

    Args:
        directory: What ``ovsprune prune --method imp`` wrote.
        verify: Also compare every file's SHA-256 with the config.

    Raises:
        CheckpointError: A file is missing, damaged, or does not fit the others.
    """
    path = Path(directory)
    spec = _read_spec(path)
    for name in (MODEL, MASKS):
        if name not in spec.files:
            raise CheckpointError(f"{path / CONFIG}: files does not list {name}; write it again")
    check_files(path, spec.files, verify=verify)
    masks, tensors = read_packed(path / MASKS), read_tensors(path / MODEL)
    _check(spec, masks, tensors, str(path))
    return MaskedCheckpoint(path, spec, masks, tensors)


def is_unstructured(directory: Path) -> bool:
    """Whether the config of a directory says that it is an unstructured result."""
    try:
        document, file = read_config(directory)
        found = fields.parse(document, str(file))
    except CheckpointError:
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT


def _read_spec(path: Path) -> MaskedSpec:
    document, file = read_config(path)
    return MaskedSpec.from_json(document, str(file))


def _check(
    spec: MaskedSpec, masks: Mapping[str, Tensor], tensors: Mapping[str, Tensor], at: str
) -> None:
    """Check that masks and weights are those that the spec describes.

    Raises:
        CheckpointError: They are not.
    """
    again = "copy it again, or prune again"
    odd = sorted({w.name for w in spec.weights} ^ set(masks))
    if odd:
        raise CheckpointError(f"{at}: {odd[0]} is in the config or in the masks and not both")
    for weight in spec.weights:
        mask, tensor = masks[weight.name], tensors.get(f"{TOWER}{weight.name}")
        zeros = mask.numel() - int(mask.sum())
        if tuple(mask.shape) != weight.shape or zeros != weight.zeros:
            raise CheckpointError(
                f"{at}: the mask of {weight.name} has shape {tuple(mask.shape)} and {zeros} zeros, "
                f"the config says {weight.shape} and {weight.zeros}; {again}"
            )
        if tensor is None or tuple(tensor.shape) != weight.shape:
            has = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
            raise CheckpointError(
                f"{at}: the weight {TOWER}{weight.name} {has}, expected {weight.shape}; {again}"
            )
        if bool((tensor.detach().cpu()[~mask.cpu()] != 0).any()):
            raise CheckpointError(
                f"{at}: the weight {TOWER}{weight.name} is not zero everywhere where its mask says "
                f"so; {again}"
            )
    missing = sorted(n for n in spec.base.tensors if f"{TOWER}{n}" not in tensors)
    if missing:
        raise CheckpointError(f"{at}: the tensor {TOWER}{missing[0]} is missing; {again}")
