"""Masks in files: ours, and the form of torch.nn.utils.prune.

A file of ours is a safetensors file of packed bits, whose header has the shapes. The form of
torch.nn.utils.prune is a state dict in which a pruned ``X`` is ``X_orig`` and ``X_mask``; the mask
files of OpenTrans are such state dicts under the entry ``backbone``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ovsprune.core.errors import CheckpointError, OptionError, OutputError
from ovsprune.core.files import staged_file
from ovsprune.core.foreign import read_foreign
from ovsprune.masks.directory import read_unstructured
from ovsprune.masks.packing import is_packed, read_packed, save_packed

__all__ = ["FORMS", "read_masks", "read_weights", "write_masks"]

FORMS = ("ovsprune", "torch")


def read_masks(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Masks from a directory or a file, ours or of torch.nn.utils.prune.

    Args:
        path: What ``ovsprune prune --method imp`` or :func:`write_masks` wrote; or a state dict of
            pruned modules (.pth, .pt or .safetensors), at the file's top level or in an entry of
            it, as OpenTrans's. Nothing in it is unpickled.

    Returns:
        Parameter's name (without ``module.``, where all have it) to bool of the weight's shape,
        True where the weight stays.

    Raises:
        CheckpointError: It is damaged, or holds no masks; names the tensor that is wrong.
    """
    path = Path(path)
    if path.is_dir():
        return dict(read_unstructured(path).masks)
    if is_packed(path):
        return read_packed(path)
    state = _pruned_state(path)
    return {name: _mask(state, name, path) for name in _pruned(state)}


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights that :func:`read_masks` finds masks with, zero where those say so.

    Args:
        path: A directory of ours, or a state dict of pruned modules.

    Returns:
        Name to tensor under the plain names, as after ``torch.nn.utils.prune.remove``; of a
        directory, the image tower's.

    Raises:
        CheckpointError: It is damaged, or holds masks and no weights.
    """
    path = Path(path)
    if path.is_dir():
        return read_unstructured(path).tower()
    if is_packed(path):
        raise CheckpointError(f"{path} holds masks alone, without weights; read it with read_masks")
    state = _pruned_state(path)
    found = {}
    for name in _pruned(state):
        if f"{name}_orig" not in state:
            raise CheckpointError(
                f"{path} holds {name}_mask without {name}_orig, so it has masks and no weights; "
                "read it with read_masks"
            )
        found[name] = state[f"{name}_orig"].masked_fill(~_mask(state, name, path), 0)
    gone = {f"{name}{end}" for name in found for end in ("_orig", "_mask")}
    return {**{k: v for k, v in state.items() if k not in gone}, **found}


def write_masks(
    path: str | os.PathLike[str],
    masks: Mapping[str, Tensor],
    *,
    form: str = "ovsprune",
    weights: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write masks to one file, complete or not at all.

    Args:
        path: The file; ``.safetensors`` for the form ``"ovsprune"``, ``.pth`` or ``.pt`` for
            ``"torch"``.
        masks: Parameter's name to bool of the weight's shape, True where the weight stays.
        form: ``"ovsprune"``: packed bits; ``"torch"``: a state dict as modules have it that
            torch.nn.utils.prune has pruned.
        weights: For ``"torch"``, the state dict of the module: what has a mask is written as
            ``X_orig`` beside ``X_mask``, everything else as it is, so that a module pruned with
            ``custom_from_mask`` loads it. Without it, ``X_mask`` alone is written.
        overwrite: Replace a file that exists.

    Returns:
        The file.

    Raises:
        OptionError: The form is unknown, or does not go with ``path`` or ``weights``.
        CheckpointError: A mask has no weight, or one of another shape.
        OutputError: The file exists, or cannot be written.
    """
    path = Path(path)
    _check_form(path, form, weights)
    if os.path.lexists(path) and (path.is_dir() or not overwrite):
        what = "is a directory" if path.is_dir() else "exists already"
        raise OutputError(f"{path} {what}; choose another file, or pass overwrite=True")
    plain = {name: mask.detach().cpu().bool() for name, mask in masks.items()}
    if not plain:
        raise OptionError("there are no masks to write")
    state = _torch_form(plain, weights) if form == "torch" else {}
    with staged_file(path) as scratch:
        if form == "torch":
            _save(state, scratch)
        else:
            save_packed(plain, scratch)
    return path


def _pruned_state(path: Path) -> Mapping[str, Tensor]:
    what = "masks (names like layer.weight_mask, as torch.nn.utils.prune gives them)"
    return read_foreign(path, lambda state: bool(_pruned(state)), what).tensors


def _pruned(state: Mapping[str, Any]) -> list[str]:
    """Names of the pruned parameters; attention masks and the like are none."""
    names = [key.removesuffix("_mask") for key in state if key.endswith("_mask")]
    return [n for n in names if f"{n}_orig" in state or n.endswith(("weight", "bias"))]


def _mask(state: Mapping[str, Tensor], name: str, path: Path) -> Tensor:
    mask = state[f"{name}_mask"]
    if not ((mask == 0) | (mask == 1)).all():
        raise CheckpointError(
            f"{path}: {name}_mask holds values other than 0 and 1, so it is no mask of "
            "torch.nn.utils.prune"
        )
    weight = state.get(f"{name}_orig")
    if weight is not None and weight.shape != mask.shape:
        raise CheckpointError(
            f"{path}: {name}_mask has shape {tuple(mask.shape)}, {name}_orig "
            f"{tuple(weight.shape)}; the file was edited or damaged"
        )
    return mask.bool()


def _check_form(path: Path, form: str, weights: Mapping[str, Tensor] | None) -> None:
    if form not in FORMS:
        raise OptionError(f"form {form!r} is unknown; known: {', '.join(FORMS)}")
    if (form == "ovsprune") != (path.suffix == ".safetensors"):
        ending = ".safetensors" if form == "ovsprune" else ".pth or .pt"
        raise OptionError(f"{path} is no name for the form {form!r}: it ends in {ending}")
    if form == "ovsprune" and weights is not None:
        raise OptionError("the form 'ovsprune' holds masks alone; leave weights out")


def _torch_form(
    masks: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    if weights is None:
        return {f"{name}_mask": mask.float() for name, mask in masks.items()}
    for name, mask in masks.items():
        if name not in weights or weights[name].shape != mask.shape:
            has = f"shape {tuple(weights[name].shape)}" if name in weights else "no weight"
            raise CheckpointError(
                f"the mask {name} has shape {tuple(mask.shape)}, and there is {has} of that name "
                "in weights; give the state dict of the tower that the masks belong to"
            )
    state: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        plain = tensor.detach().cpu()
        if name in masks:
            state[f"{name}_orig"] = plain
            state[f"{name}_mask"] = masks[name].to(plain.dtype)
        else:
            state[name] = plain
    return state


def _save(state: Mapping[str, Tensor], file: Path) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:  # torch's writer reports a failed write this way
        raise OSError(str(error)) from error
