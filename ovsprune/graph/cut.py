"""Cutting units out of a tower, and masking them, which must come to the same."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ovsprune.core.records import Axis, Group, Plan
from ovsprune.graph.layers import bias_of, is_channelwise, weight_axis, weight_of

__all__ = ["cut", "kept_rows", "mask", "removed_units"]


def cut(tower: nn.Module, groups: Iterable[Group], plan: Plan) -> None:
    """Cut, in place, every unit that ``plan`` does not keep."""
    groups = [g for g in groups if plan.width(g.name) < g.units]
    for (name, axis), indices in kept_rows(tower, groups, plan).items():
        _cut_axis(tower.get_submodule(name), axis, indices)


def kept_rows(
    tower: nn.Module, groups: Iterable[Group], plan: Plan
) -> dict[tuple[str, Axis], Tensor]:
    """What stays of every layer that ``groups`` have slices of: (layer, axis) to int64, ascending.

    Groups may share an axis: what any of them loses is gone.

    Args:
        tower: In whose coordinates the groups are.
        groups: Cut or not.
        plan: What is kept of them.
    """
    keep: dict[tuple[str, Axis], Tensor] = {}
    for group in groups:
        gone = removed_units(group, plan)
        for part in group.slices:
            layer = tower.get_submodule(part.module)
            size = weight_of(layer).shape[weight_axis(part.axis)]
            key = part.module, part.axis
            alive = keep.setdefault(key, torch.ones(size, dtype=torch.bool))
            alive[part.rows[gone].flatten()] = False
    return {key: alive.nonzero().flatten() for key, alive in keep.items()}


@torch.no_grad()
def mask(tower: nn.Module, groups: Iterable[Group], plan: Plan) -> None:
    """Mask, in place, the units that ``plan`` does not keep: whatever reads them reads zero.

    Where a norm between the units and the consumer sees them first, the layers that make the units
    give zero, too.
    """
    for group in groups:
        gone = removed_units(group, plan)
        for part in group.readers:
            layer = tower.get_submodule(part.module)
            _clear(weight_of(layer), weight_axis("in"), part.rows[gone])
        for part in group.slices if group.norms else ():
            layer = tower.get_submodule(part.module)
            if part.axis == "in" or is_channelwise(layer):
                continue
            for tensor in (weight_of(layer), bias_of(layer)):
                if tensor is not None:
                    _clear(tensor, weight_axis("out"), part.rows[gone])


def _clear(tensor: Tensor, axis: int, rows: Tensor) -> None:
    tensor.index_fill_(axis, rows.flatten().to(tensor.device), 0.0)


def removed_units(group: Group, plan: Plan) -> Tensor:
    """int64: the units of ``group`` that ``plan`` does not keep, ascending."""
    gone = torch.ones(group.units, dtype=torch.bool)
    gone[plan.kept[group.name]] = False
    return gone.nonzero().flatten()


# Attribute that says how wide a layer is, by axis, for every layer type of torch that can be cut.
_WIDTHS: dict[str, tuple[str, ...]] = {
    "out": ("out_features", "out_channels", "num_features", "normalized_shape"),
    "in": ("in_features", "in_channels"),
}


def _cut_axis(layer: nn.Module, axis: Axis, indices: Tensor) -> None:
    # Of a depthwise convolution every width is the number of its channels.
    whole = axis == "out" and weight_of(layer).ndim > 1 and is_channelwise(layer)
    tensors = {"weight": weight_axis(axis)}
    if axis == "out":
        tensors |= {"bias": 0, "running_mean": 0, "running_var": 0}
    for name, dim in tensors.items():
        old = getattr(layer, name, None)
        if old is None:
            continue
        new = old.detach().index_select(dim, indices.to(old.device)).clone()
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(layer, name, new)
    for attribute in (*_WIDTHS[axis], *(("in_channels", "groups") if whole else ())):
        if hasattr(layer, attribute):
            wide = attribute == "normalized_shape"
            setattr(layer, attribute, (len(indices),) if wide else len(indices))
