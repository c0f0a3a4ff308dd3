"""Cutting units out of a tower, and masking them, which must come to the same."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ovsprune.core.records import Axis, Group, Plan
from ovsprune.graph.layers import bias_of, find, is_channelwise, weight_axis, weight_of

__all__ = ["cut", "kept_rows", "mask", "removed"]


def cut(tower: nn.Module, groups: Iterable[Group], plan: Plan) -> None:
    """Cut, in place, every unit that ``plan`` does not keep."""
    groups = [g for g in groups if plan.width(g.name) < g.units]
    for (name, axis), indices in kept_rows(tower, groups, plan).items():
        part = find(tower, name)
        if isinstance(part, nn.Module):
            _cut_axis(part, axis, indices)
        else:
            owner, _, own = name.rpartition(".")
            tower.get_submodule(owner)._parameters[own] = _chosen(part, axis, indices)
    for group in groups:
        if group.attribute is not None:
            owner, _, name = group.attribute.rpartition(".")
            setattr(tower.get_submodule(owner), name, plan.width(group.name))


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
        gone = removed(group, plan)
        for part in group.slices:
            layer = find(tower, part.module)
            size = weight_of(layer).shape[weight_axis(layer, part.axis)]
            key = part.module, part.axis
            alive = keep.setdefault(key, torch.ones(size, dtype=torch.bool))
            alive[part.rows[gone].flatten()] = False
    return {key: alive.nonzero().flatten() for key, alive in keep.items()}


@torch.no_grad()
def mask(tower: nn.Module, groups: Iterable[Group], plan: Plan) -> None:
    """Mask, in place, the units that ``plan`` does not keep: whatever reads them reads zero.

    Where the consumer has no columns of them, or a norm in between sees them first, what makes them
    gives zero. So do, of a residual stream's channels, the norms themselves: what one of them gives
    may be added to the stream again, where the next counts it.
    """
    for group in groups:
        gone = removed(group, plan)
        if group.has_columns:
            for part in group.readers:
                layer = find(tower, part.module)
                _clear(weight_of(layer), weight_axis(layer, "in"), part.rows[gone])
        for part in group.slices if group.norms or not group.has_columns else ():
            layer = find(tower, part.module)
            if part.axis == "in" or (is_channelwise(layer) and not group.across):
                continue
            for tensor in (weight_of(layer), bias_of(layer)):
                if tensor is not None:
                    _clear(tensor, weight_axis(layer, "out"), part.rows[gone])


def _clear(tensor: Tensor, axis: int, rows: Tensor) -> None:
    tensor.index_fill_(axis, rows.flatten().to(tensor.device), 0.0)


def removed(group: Group, plan: Plan) -> Tensor:
    """int64: the units of ``group`` that ``plan`` does not keep, ascending."""
    gone = torch.ones(group.units, dtype=torch.bool)
    gone[plan.kept[group.name]] = False
    return gone.nonzero().flatten()


# Attribute that says how wide a layer is, by axis, for every layer type of torch that can be cut.
_WIDTHS: dict[str, tuple[str, ...]] = {
    "out": ("out_features", "out_channels", "num_features", "normalized_shape"),
    "in": ("in_features", "in_channels"),
}


def _chosen(tensor: nn.Parameter, axis: Axis, indices: Tensor) -> nn.Parameter:
    kept = tensor.detach().index_select(weight_axis(tensor, axis), indices.to(tensor.device))
    return nn.Parameter(kept, requires_grad=tensor.requires_grad)


def _cut_axis(layer: nn.Module, axis: Axis, indices: Tensor) -> None:
    # Of a depthwise convolution every width is the number of its channels.
    whole = axis == "out" and weight_of(layer).ndim > 1 and is_channelwise(layer)
    tensors = {"weight": 0 if axis == "out" else 1}
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
