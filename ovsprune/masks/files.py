"""Mask files, in the format of ovsprune and in the format of torch.nn.utils.prune.

The format of ovsprune is a safetensors file of packed bits, with the shapes in its header. The
format of torch.nn.utils.prune is a state dict with ``X_orig`` and ``X_mask`` for a pruned ``X``.
The mask files of OpenTrans are such state dicts in the entry ``backbone``.
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
from ovsprune.core.unpickle.foreign import read_foreign
from ovsprune.masks.directory import read_unstructured
from ovsprune.masks.packing import is_packed, read_packed, save_packed

__all__ = ["FORMS", "read_masks", "read_weights", "write_masks"]

FORMS = ("ovsprune", "torch")
"""Names of the file formats."""


def read_masks(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read masks from a directory or a file, of ovsprune or of torch.nn.utils.prune.

    Args:
        path: A directory that ``ovsprune prune --method imp`` wrote, a file that
            :func:`write_masks` wrote, or a state dict of pruned modules (.pth, .pt or
            .safetensors), at the top level of the file or in an entry of it, as in OpenTrans.
            The file cannot execute code.

    Returns:
        Map of parameter name (without a common prefix ``module.``) to bool of the weight's shape,
        True where the weight is kept.

    Raises:
        CheckpointError: The file is damaged or holds no masks. The message names the tensor.
    """
    path = Path(path)
    if path.is_dir():
        return dict(read_unstructured(path).masks)
    if is_packed(path):
        return read_packed(path)
    state = _pruned_state(path)
    return {name: _mask(state, name, path) for name in _pruned(state)}


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the masked weights of a file or directory that also holds masks.

    Args:
        path: A directory of ovsprune, or a state dict of pruned modules.

    Returns:
        Map of plain name (as after ``torch.nn.utils.prune.remove``) to tensor; for a directory, the
        tensors of the image tower.

    Raises:
        CheckpointError: The file is damaged, or holds masks without weights.
    """
    path = Path(path)
    if path.is_dir():
        return read_unstructured(path).tower()
    if is_packed(path):
        raise CheckpointError(f"{path} holds masks without weights; read it with read_masks")
    state = _pruned_state(path)
    masked = {}
    for name in _pruned(state):
        if f"{name}_orig" not in state:
            raise CheckpointError(
                f"{path} holds {name}_mask without {name}_orig, so it has no weights; "
                "read it with read_masks"
            )
        # _orig holds the values before pruning, also at removed positions
        masked[name] = state[f"{name}_orig"].masked_fill(~_mask(state, name, path), 0)
    # As prune.remove does: the masked weight takes the place of its two tensors.
    replaced = {f"{name}{end}" for name in masked for end in ("_orig", "_mask")}
    return {**{k: v for k, v in state.items() if k not in replaced}, **masked}


def write_masks(
    path: str | os.PathLike[str],
    masks: Mapping[str, Tensor],
    *,
    form: str = "ovsprune",
    weights: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write masks to one file atomically.

    Args:
        path: The file: ``.safetensors`` for the format ``"ovsprune"``, ``.pth`` or ``.pt`` for
            ``"torch"``.
        masks: Map of parameter name to bool of the weight's shape, True where the weight is kept.
        form: Format of the file. ``"ovsprune"``: packed bits. ``"torch"``: state dict of modules
            that torch.nn.utils.prune has pruned.
        weights: State dict of the module, for ``"torch"`` only. Tensors with a mask are written as
            ``X_orig`` and ``X_mask``, others unchanged, so that a module pruned with
            ``custom_from_mask`` can load the file. Without ``weights``, only ``X_mask`` is
            written.
        overwrite: Replace a file that exists.

    Returns:
        The file.

    Raises:
        OptionError: ``form`` is unknown, or does not match ``path`` or ``weights``.
        CheckpointError: A mask has no weight, or one of another shape.
        OutputError: The file exists, or cannot be written.
    """
    path = Path(path)
    _check_form(path, form, weights)
    # lexists also sees a broken link, which the rename would replace.
    if os.path.lexists(path) and (path.is_dir() or not overwrite):
        problem = "is a directory" if path.is_dir() else "exists already"
        raise OutputError(f"{path} {problem}; choose another file, or pass overwrite=True")
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
    """Read the state dict of pruned modules from anywhere in a file."""
    what = "masks (names like layer.weight_mask, as torch.nn.utils.prune writes them)"
    return read_foreign(path, lambda state: bool(_pruned(state)), what).tensors


def _pruned(state: Mapping[str, Any]) -> list[str]:
    """Return the names of the pruned parameters; other masks (attention) are skipped."""
    names = [key.removesuffix("_mask") for key in state if key.endswith("_mask")]
    # A file of masks only has no _orig, so the ending of the name must decide.
    return [n for n in names if f"{n}_orig" in state or n.endswith(("weight", "bias"))]


def _mask(state: Mapping[str, Tensor], name: str, path: Path) -> Tensor:
    """Return the mask of a parameter, checked, as bool of the weight's shape."""
    mask = state[f"{name}_mask"]
    if not ((mask == 0) | (mask == 1)).all():
        raise CheckpointError(
            f"{path}: {name}_mask holds values other than 0 and 1, so it is not a mask of "
            "torch.nn.utils.prune"
        )
    weight = state.get(f"{name}_orig")
    if weight is not None and weight.shape != mask.shape:
        raise CheckpointError(
            f"{path}: {name}_mask has shape {tuple(mask.shape)}, but {name}_orig has "
            f"{tuple(weight.shape)}; the file was edited or damaged"
        )
    return mask.bool()


def _check_form(path: Path, form: str, weights: Mapping[str, Tensor] | None) -> None:
    if form not in FORMS:
        raise OptionError(f"form {form!r} is unknown; known forms: {', '.join(FORMS)}")
    if (form == "ovsprune") != (path.suffix == ".safetensors"):
        ending = ".safetensors" if form == "ovsprune" else ".pth or .pt"
        raise OptionError(
            f"{path} has the wrong suffix: a file of the form {form!r} ends in {ending}"
        )
    if form == "ovsprune" and weights is not None:
        raise OptionError("a file of the form 'ovsprune' holds masks only; leave weights out")


def _torch_form(
    masks: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Return the state dict in the format of torch.nn.utils.prune."""
    if weights is None:  # without a weight, its type is unknown; torch's default is float32
        return {f"{name}_mask": mask.float() for name, mask in masks.items()}
    for name, mask in masks.items():
        if name not in weights or weights[name].shape != mask.shape:
            weight = f"has shape {tuple(weights[name].shape)}" if name in weights else "is missing"
            raise CheckpointError(
                f"the mask {name} has shape {tuple(mask.shape)}, but the weight of that name in "
                f"weights {weight}; give the state dict of the tower that the masks belong to"
            )
    state: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        plain = tensor.detach().cpu()
        if name in masks:
            state[f"{name}_orig"] = plain
            # torch multiplies _orig by _mask: another dtype would change the weight's
            state[f"{name}_mask"] = masks[name].to(plain.dtype)
        else:
            state[name] = plain
    return state


def _save(state: Mapping[str, Tensor], file: Path) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:  # torch's writer reports a failed write this way
        raise OSError(str(error)) from error
