"""Whether mask, tensors and spec of a checkpoint belong together, asked in writing and reading."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ovsprune.core.errors import CheckpointError
from ovsprune.slim.cutting import tensor_axes
from ovsprune.slim.fields import DOTTED
from ovsprune.slim.spec import MASK, MODEL, LayerSpec, SlimSpec

__all__ = ["TOWER", "check_mask", "check_tensors", "kept_width"]

TOWER = "visual."

_AGAIN = "copy or write the checkpoint again"


def check_mask(spec: SlimSpec, mask: Mapping[str, Tensor], at: str = MASK) -> None:
    """Check that ``mask`` holds the kept indices of every layer of ``spec``, and nothing else.

    Args:
        spec: What the mask should fit.
        mask: Layer name to int64 [kept], strictly ascending within [0, units).
        at: Where it comes from, for messages.

    Raises:
        CheckpointError: It does not.
    """
    names = {layer.name for layer in spec.layers}
    for problem, found in (("lacks", names - set(mask)), ("has unknown", set(mask) - names)):
        if found:
            raise CheckpointError(
                f"{at} {problem} layers {', '.join(sorted(found))[:200]}, expected one entry for "
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
                f"{at}: {layer.name} is not strictly ascending, so a unit is out of order or "
                f"there twice; {_AGAIN}"
            )
        if not kept.numel():
            continue
        if int(kept[0]) < 0 or int(kept[-1]) >= layer.units:
            raise CheckpointError(
                f"{at}: {layer.name} keeps units from {int(kept[0])} to {int(kept[-1])}, expected "
                f"indices within [0, {layer.units}); {_AGAIN}"
            )


def kept_width(layer: LayerSpec) -> int:
    """Channels that the kept units of ``layer`` have together."""
    return layer.kept * layer.unit_width


def check_tensors(spec: SlimSpec, tensors: Mapping[str, Tensor], at: str = MODEL) -> None:
    """Check that ``tensors`` holds a tower that is cut as ``spec`` says.

    Args:
        spec: What the tensors should fit.
        tensors: Everything in the file, the tower's names with the prefix ``visual.``.
        at: Where it comes from, for messages.

    Raises:
        CheckpointError: It does not.
    """
    for name in tensors:
        if re.fullmatch(DOTTED, name) is None:
            raise CheckpointError(f"{at}: {name[:80]!r} is no name of a tensor; {_AGAIN}")
    if not any(name.startswith(TOWER) for name in tensors):
        raise CheckpointError(f"{at} has no tensor of the tower ({TOWER}*); {_AGAIN}")
    for layer in spec.layers:
        if layer.is_whole_attention:
            _check_heads(layer, tensors, at)
            continue
        for part in layer.slices:
            module = f"{TOWER}{part.module}"
            found = tensor_axes(module, part.axis, tensors) or {f"{module}.weight": 0}
            for name, axis in found.items():
                shape = tuple(_tensor(tensors, name, at).shape)
                # other groups may share the axis, so it can be wider than this one
                if len(shape) <= axis or not shape or shape[axis] < kept_width(layer):
                    raise CheckpointError(
                        f"{at}: {name} has shape {shape}, expected at least {kept_width(layer)} "
                        f"on axis {axis} for {layer.kept} units of {layer.name}; {_AGAIN}"
                    )


def _check_heads(layer: LayerSpec, tensors: Mapping[str, Tensor], at: str) -> None:
    width = kept_width(layer)
    for name, axis, size in _head_tensors(f"{TOWER}{layer.name}", tensors, width):
        full = f"{TOWER}{layer.name}.{name}"
        shape = tuple(_tensor(tensors, full, at).shape)
        if len(shape) != 2 or shape[axis] != size:
            raise CheckpointError(
                f"{at}: {full} has shape {shape}, expected {size} on axis {axis} for "
                f"{layer.kept} heads of width {layer.unit_width}; {_AGAIN}"
            )


def _head_tensors(
    path: str, tensors: Mapping[str, Tensor], width: int
) -> list[tuple[str, int, int]]:
    """Weights of an attention by the names that it has there, the axis that is cut, its size."""
    if f"{path}.qkv.weight" in tensors:
        return [("qkv.weight", 0, 3 * width), ("proj.weight", 1, width)]
    if f"{path}.q_proj.weight" in tensors:
        out = "proj.weight" if f"{path}.proj.weight" in tensors else "out_proj.weight"
        return [*((f"{which}_proj.weight", 0, width) for which in "qkv"), (out, 1, width)]
    return [("in_proj_weight", 0, 3 * width), ("out_proj.weight", 1, width)]


def _tensor(tensors: Mapping[str, Tensor], name: str, at: str) -> Tensor:
    try:
        return tensors[name]
    except KeyError:
        raise CheckpointError(f"{at} lacks the tensor {name}; {_AGAIN}") from None
