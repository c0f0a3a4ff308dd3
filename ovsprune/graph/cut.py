"""Remove units from a tower (cut) or zero them (mask); both give the same outputs."""

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
    """Return the indices that stay in each layer of ``groups``.

    Several groups may have slices on the same axis; an index stays if no group removes it.

    Args:
        tower: Tower in whose coordinates the groups are defined.
        groups: Groups, with or without removed units.
        plan: Units to keep.

    Returns:
        (Dotted layer name, axis) to ascending int64 indices.
    """
    keep: dict[tuple[str, Axis], Tensor] = {}  # boolean masks over the axis
    for group in groups:
        units = removed_units(group, plan)
        for part in group.slices:
            layer = tower.get_submodule(part.module)
            size = weight_of(layer).shape[weight_axis(part.axis)]
            key = part.module, part.axis
            stays = keep.setdefault(key, torch.ones(size, dtype=torch.bool))
            stays[part.rows[units].flatten()] = False
    return {key: stays.nonzero().flatten() for key, stays in keep.items()}


@torch.no_grad()
def mask(tower: nn.Module, groups: Iterable[Group], plan: Plan) -> None:
    """Zero, in place, the weights that read the units that ``plan`` does not keep.

    If a norm lies between the units and the consumer, the weights that produce the units are
    zeroed too: a cut layer norm counts removed channels as zeros.
    """
    for group in groups:
        units = removed_units(group, plan)
        for part in group.readers:
            layer = tower.get_submodule(part.module)
            _clear(weight_of(layer), weight_axis("in"), part.rows[units])
        for part in group.slices if group.norms else ():
            layer = tower.get_submodule(part.module)
            if part.axis == "in" or is_channelwise(layer):
                continue
            for tensor in (weight_of(layer), bias_of(layer)):
                if tensor is not None:
                    _clear(tensor, weight_axis("out"), part.rows[units])


def _clear(tensor: Tensor, axis: int, rows: Tensor) -> None:
    tensor.index_fill_(axis, rows.flatten().to(tensor.device), 0.0)


def removed_units(group: Group, plan: Plan) -> Tensor:
    """Return the units of ``group`` that ``plan`` does not keep, ascending int64 indices."""
    is_removed = torch.ones(group.units, dtype=torch.bool)
    is_removed[plan.kept[group.name]] = False
    return is_removed.nonzero().flatten()


# Attributes that hold the width of a layer, by axis, for every layer type of torch that can be cut.
_WIDTHS: dict[str, tuple[str, ...]] = {
    "out": ("out_features", "out_channels", "num_features", "normalized_shape"),
    "in": ("in_features", "in_channels"),
}


def _cut_axis(layer: nn.Module, axis: Axis, indices: Tensor) -> None:
    """Keep only ``indices`` of one axis of the layer, in place."""
    # A depthwise convolution has as many inputs and groups as outputs: all of them change.
    is_depthwise = axis == "out" and weight_of(layer).ndim > 1 and is_channelwise(layer)
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
    for attribute in (*_WIDTHS[axis], *(("in_channels", "groups") if is_depthwise else ())):
        if hasattr(layer, attribute):
            is_tuple = attribute == "normalized_shape"
            setattr(layer, attribute, (len(indices),) if is_tuple else len(indices))
