"""Cutting units out of a tower, and masking them, which must come to the same."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ovsprune.core.records import Group, Plan, Slice
from ovsprune.graph.layers import is_channelwise, weight_of

__all__ = ["cut", "cut_group", "mask", "removed"]


def cut(tower: nn.Module, groups: Iterable[Group], plan: Plan) -> None:
    """Cut, in place, every unit that ``plan`` does not keep."""
    for group in groups:
        if plan.width(group.name) < group.units:
            cut_group(tower, group, plan.kept[group.name])


def cut_group(tower: nn.Module, group: Group, kept: Tensor) -> None:
    """Cut one group in place so that only the units ``kept`` (int64, ascending) stay."""
    for part in group.slices:
        _cut_slice(tower.get_submodule(part.module), part, part.rows[kept].flatten())


@torch.no_grad()
def mask(tower: nn.Module, groups: Iterable[Group], plan: Plan) -> None:
    """Mask, in place, the units that ``plan`` does not keep: their consumer reads them as zero."""
    for group in groups:
        columns = group.columns[removed(group, plan)].flatten()
        if columns.numel():
            weight = weight_of(tower.get_submodule(group.consumer))
            weight[:, columns.to(weight.device)] = 0.0


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


def _cut_slice(layer: nn.Module, part: Slice, indices: Tensor) -> None:
    axis = 0 if part.axis == "out" else 1
    # Of a depthwise convolution every width is the number of its channels.
    whole = axis == 0 and weight_of(layer).ndim > 1 and is_channelwise(layer)
    tensors = {"weight": axis}
    if axis == 0:
        tensors |= {"bias": 0, "running_mean": 0, "running_var": 0}
    for name, dim in tensors.items():
        old = getattr(layer, name, None)
        if old is None:
            continue
        new = old.detach().index_select(dim, indices.to(old.device)).clone()
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(layer, name, new)
    for attribute in (*_WIDTHS[part.axis], *(("in_channels", "groups") if whole else ())):
        if hasattr(layer, attribute):
            wide = attribute == "normalized_shape"
            setattr(layer, attribute, (len(indices),) if wide else len(indices))
