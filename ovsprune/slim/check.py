"""Consistency checks of the mask, tensors and spec of a checkpoint, for writing and reading."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ovsprune.core.errors import CheckpointError
from ovsprune.slim.cutting import tensor_axes
from ovsprune.slim.fields import DOTTED
from ovsprune.slim.spec import LayerSpec, SlimSpec

__all__ = ["TOWER", "check_mask", "check_tensors"]

TOWER = "visual."
"""Prefix of the image tower's tensors in a checkpoint."""

_AGAIN = "copy or write the checkpoint again"


def check_mask(spec: SlimSpec, mask: Mapping[str, Tensor], at: str) -> None:
    """Check that ``mask`` holds the kept indices of every layer of ``spec``, and nothing else.

    The indices are int64 [kept], strictly ascending within [0, units).

    Raises:
        CheckpointError: The mask does not fit; the message names its origin ``at`` and the layer.
    """
    names = {layer.name for layer in spec.layers}
    for problem, layers in (("lacks", names - set(mask)), ("has unknown", set(mask) - names)):
        if layers:
            raise CheckpointError(
                f"{at} {problem} layers {', '.join(sorted(layers))[:200]}, expected one entry for "
                f"each of the {len(names)} layers of the config; {_AGAIN}"
            )
    for layer in spec.layers:
        kept = mask[layer.name]
        if kept.dtype != torch.int64 or kept.dim() != 1:
            raise CheckpointError(
                f"{at}: {layer.name} is {kept.dtype} {tuple(kept.shape)}, expected int64 "
                f"[{layer.kept}] of kept indices; {_AGAIN}"
            )
        if kept.numel() != layer.kept:
            raise CheckpointError(
                f"{at}: {layer.name} keeps {kept.numel()} units, the config says {layer.kept}; "
                f"{_AGAIN}"
            )
        if bool((kept[1:] <= kept[:-1]).any()):
            raise CheckpointError(
                f"{at}: the indices of {layer.name} are not strictly ascending: a unit is out of "
                f"order or repeated; {_AGAIN}"
            )
        if kept.numel() and (int(kept[0]) < 0 or int(kept[-1]) >= layer.units):
            raise CheckpointError(
                f"{at}: {layer.name} keeps units from {int(kept[0])} to {int(kept[-1])}, expected "
                f"indices within [0, {layer.units}); {_AGAIN}"
            )


def check_tensors(spec: SlimSpec, tensors: Mapping[str, Tensor], at: str) -> None:
    """Check that all ``tensors`` of a file fit a tower that is cut according to ``spec``.

    Raises:
        CheckpointError: The tensors do not fit; the message names their origin ``at`` and the
            tensor.
    """
    for name in tensors:
        if re.fullmatch(DOTTED, name) is None:
            raise CheckpointError(
                f"{at}: {name[:80]!r} is not a valid tensor name (dotted words); {_AGAIN}"
            )
    if not any(name.startswith(TOWER) for name in tensors):
        raise CheckpointError(f"{at} has no tensor of the tower ({TOWER}*); {_AGAIN}")
    for layer in spec.layers:
        if layer.is_whole_attention:
            _check_heads(layer, tensors, at)
            continue
        width = layer.kept * layer.unit_width
        for part in layer.slices:
            module = f"{TOWER}{part.module}"
            # Without any tensor of the layer, look up its weight to report that it is missing.
            axes = tensor_axes(module, part.axis, tensors) or {f"{module}.weight": 0}
            for name, axis in axes.items():
                shape = _shape(tensors, name, at)
                # Several groups may have units on the same axis, so it can be wider.
                if len(shape) <= axis or shape[axis] < width:
                    raise CheckpointError(
                        f"{at}: {name} has shape {shape}, expected at least {width} "
                        f"on axis {axis} for {layer.kept} units of {layer.name}; {_AGAIN}"
                    )


def _check_heads(layer: LayerSpec, tensors: Mapping[str, Tensor], at: str) -> None:
    """Check the weights of an attention module that is cut by head, by the names of its library."""
    path, width = f"{TOWER}{layer.name}", layer.kept * layer.unit_width
    if f"{path}.qkv.weight" in tensors:
        inputs, output = {"qkv.weight": 3 * width}, "proj.weight"
    elif f"{path}.q_proj.weight" in tensors:
        inputs = {f"{letter}_proj.weight": width for letter in "qkv"}
        output = "proj.weight" if f"{path}.proj.weight" in tensors else "out_proj.weight"
    else:
        inputs, output = {"in_proj_weight": 3 * width}, "out_proj.weight"
    for name, size in {**inputs, output: width}.items():
        full, axis = f"{path}.{name}", 1 if name == output else 0
        shape = _shape(tensors, full, at)
        if len(shape) != 2 or shape[axis] != size:
            raise CheckpointError(
                f"{at}: {full} has shape {shape}, expected {size} on axis {axis} for "
                f"{layer.kept} heads of width {layer.unit_width}; {_AGAIN}"
            )


def _shape(tensors: Mapping[str, Tensor], name: str, at: str) -> tuple[int, ...]:
    """Return the shape of a tensor, which must exist."""
    if name not in tensors:
        raise CheckpointError(f"{at} lacks the tensor {name}; {_AGAIN}")
    return tuple(tensors[name].shape)
