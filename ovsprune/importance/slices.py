"""What belongs to a unit: its part of every weight of the group."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ovsprune.core.protocols import GroupContext
from ovsprune.graph.layers import weight_of
from ovsprune.graph.rows import flat_columns

__all__ = ["consumer", "square_norms", "weights"]


def weights(ctx: GroupContext, *axes: str) -> Iterator[Tensor]:
    """The weights of the group's slices, unit by unit, a slice at a time.

    Args:
        ctx: The group and its layers.
        axes: ``"out"`` for the layers that make the units, ``"in"`` for those that read them; none
            for all.

    Yields:
        float64 [units, k], on the CPU: the k weights of each unit in one slice. Scales of norms are
        left out: they are no measure of the unit's own size.
    """
    for part in ctx.group.slices:
        weight = weight_of(ctx.layers[part.module]).detach()
        if weight.ndim == 1 or (axes and part.axis not in axes):
            continue
        rows = weight.double().cpu().transpose(0, 0 if part.axis == "out" else 1)
        yield rows[part.rows].flatten(1)


def consumer(ctx: GroupContext) -> tuple[Tensor, Tensor]:
    """The linear map that reads the units.

    Returns:
        Its weight, float64 [m, n] on the CPU, and the columns of each unit in it,
        int64 [units, k]; a convolution has a column for each channel and tap.
    """
    layer = ctx.layers[ctx.group.consumer]
    weight = weight_of(layer).detach().double().cpu().flatten(1)
    return weight, flat_columns(layer, ctx.group.columns)


def square_norms(ctx: GroupContext) -> Tensor:
    """float64 [units]: sum of squares over all weights of each unit."""
    total = torch.zeros(ctx.group.units, dtype=torch.float64)
    for rows in weights(ctx):
        total += rows.square().sum(1)
    return total
