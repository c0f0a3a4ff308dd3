"""Weights that belong to a unit: its slice of every weight in the group."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ovsprune.core.protocols import GroupContext
from ovsprune.graph.layers import weight_of
from ovsprune.graph.rows import flat_columns

__all__ = ["consumer_weight", "square_norms", "unit_weights"]


def unit_weights(ctx: GroupContext, *axes: str) -> Iterator[Tensor]:
    """Yield the weights of each slice of the group, one row per unit.

    Args:
        ctx: The group and its layers.
        axes: ``"out"`` for the layers that compute the units, ``"in"`` for those that read them;
            none for both.

    Yields:
        float64 [units, k], on the CPU: the k weights of each unit in one slice. Scales of norms are
        excluded: they do not measure the size of the unit itself.
    """
    for part in ctx.group.slices:
        weight = weight_of(ctx.layers[part.module]).detach()
        if weight.ndim == 1 or (axes and part.axis not in axes):
            continue
        rows = weight.double().cpu().transpose(0, 0 if part.axis == "out" else 1)
        yield rows[part.rows].flatten(1)  # [units, rows per unit, ...] -> [units, k]


def consumer_weight(ctx: GroupContext) -> tuple[Tensor, Tensor]:
    """Return the weight of the layer that reads the units, and each unit's columns in it.

    Returns:
        The weight, float64 [m, n] on the CPU, and the columns, int64 [units, k]. A convolution has
        one column per channel and kernel position.
    """
    layer = ctx.layers[ctx.group.consumer]
    weight = weight_of(layer).detach().double().cpu().flatten(1)
    return weight, flat_columns(layer, ctx.group.columns)


def square_norms(ctx: GroupContext) -> Tensor:
    """Return the sum of squares over all weights of each unit, float64 [units]."""
    total = torch.zeros(ctx.group.units, dtype=torch.float64)
    for rows in unit_weights(ctx):
        total += rows.square().sum(1)
    return total
