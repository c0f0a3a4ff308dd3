"""Whether mask, tensors and spec of a checkpoint belong together, asked in writing and reading."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ovsprune.core.errors import CheckpointError
from ovsprune.slim.cutting import places
from ovsprune.slim.fields import DOTTED
from ovsprune.slim.spec import MASK, MODEL, WIDTH_KINDS, LayerSpec, SlimSpec

__all__ = ["BASIS", "TOWER", "check_bases", "check_mask", "check_tensors", "kept_width"]

TOWER = "visual."
BASIS = ".basis"
"""Suffix of the basis of a layer in the file of the mask."""

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
        if layer.kind in WIDTH_KINDS and int(kept[-1]) != layer.kept - 1:
            raise CheckpointError(
                f"{at}: {layer.name} keeps the direction {int(kept[-1])}, expected the first "
                f"{layer.kept} of its basis; {_AGAIN}"
            )
        if int(kept[0]) < 0 or int(kept[-1]) >= layer.units:
            raise CheckpointError(
                f"{at}: {layer.name} keeps units from {int(kept[0])} to {int(kept[-1])}, expected "
                f"indices within [0, {layer.units}); {_AGAIN}"
            )


def check_bases(spec: SlimSpec, bases: Mapping[str, Tensor], at: str = MASK) -> None:
    """Check that ``bases`` holds the basis of every layer that lost directions, and nothing else.

    Args:
        spec: What the bases should fit.
        bases: Layer name to floating-point [heads, units, units].
        at: Where they come from, for messages.

    Raises:
        CheckpointError: It does not.
    """
    heads = {layer.name: layer.units for layer in spec.layers if layer.kind == "heads"}
    wanted = {x.name: (heads[x.name.rpartition(".")[0]], x.units, x.units) for x in spec.turned()}
    for problem, found in (
        ("lacks", wanted.keys() - bases.keys()),
        ("has an unknown", bases.keys() - wanted.keys()),
    ):
        if found:
            raise CheckpointError(f"{at} {problem} basis of {', '.join(sorted(found))}; {_AGAIN}")
    for name, basis in bases.items():
        if tuple(basis.shape) != wanted[name] or not basis.is_floating_point():
            raise CheckpointError(
                f"{at}: the basis of {name} is {basis.dtype} {tuple(basis.shape)}, expected "
                f"floating point {wanted[name]}; {_AGAIN}"
            )
        if not basis.isfinite().all() or bool((torch.linalg.det(basis.double()) == 0).any()):
            raise CheckpointError(f"{at}: the basis of {name} cannot be inverted; {_AGAIN}")


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
        if layer.whole:
            _check_heads(layer, spec.head_widths(layer), tensors, at)
            continue
        for part in layer.slices:
            module = f"{TOWER}{part.module}"
            found = places(module, part.axis, tensors) or {f"{module}.weight": 0}
            for name, axis in found.items():
                shape = tuple(_tensor(tensors, name, at).shape)
                # other groups may share the axis, so it can be wider than this one
                if len(shape) <= axis or not shape or shape[axis] < kept_width(layer):
                    raise CheckpointError(
                        f"{at}: {name} has shape {shape}, expected at least {kept_width(layer)} "
                        f"on axis {axis} for {layer.kept} units of {layer.name}; {_AGAIN}"
                    )


def _check_heads(
    layer: LayerSpec, widths: tuple[int, int], tensors: Mapping[str, Tensor], at: str
) -> None:
    qk, vo = (layer.kept * width for width in widths)
    for name, axis, size in _head_tensors(f"{TOWER}{layer.name}", tensors, qk, vo):
        full = f"{TOWER}{layer.name}.{name}"
        shape = tuple(_tensor(tensors, full, at).shape)
        if len(shape) != 2 or shape[axis] != size:
            raise CheckpointError(
                f"{at}: {full} has shape {shape}, expected {size} on axis {axis} for "
                f"{layer.kept} heads of width {' and '.join(map(str, sorted({*widths})))}; {_AGAIN}"
            )


def _head_tensors(
    path: str, tensors: Mapping[str, Tensor], qk: int, vo: int
) -> list[tuple[str, int, int]]:
    """Weights of an attention by the names that it has there, the axis that is cut, its size."""
    if f"{path}.qkv.weight" in tensors:
        return [("qkv.weight", 0, 2 * qk + vo), ("proj.weight", 1, vo)]
    if f"{path}.q_proj.weight" in tensors:
        out = "proj.weight" if f"{path}.proj.weight" in tensors else "out_proj.weight"
        apart = [(f"{which}_proj.weight", 0, vo if which == "v" else qk) for which in "qkv"]
        return [*apart, (out, 1, vo)]
    return [("in_proj_weight", 0, 2 * qk + vo), ("out_proj.weight", 1, vo)]


def _tensor(tensors: Mapping[str, Tensor], name: str, at: str) -> Tensor:
    try:
        return tensors[name]
    except KeyError:
        raise CheckpointError(f"{at} lacks the tensor {name}; {_AGAIN}") from None
