"""Global magnitude pruning: removes the smallest weights over all layers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["RATE", "keep_largest", "kept_by_round"]

RATE = 0.1
"""Fraction of the remaining weights that one round removes."""


def kept_by_round(total: int, sparsity: float, rate: float = RATE) -> list[int]:
    """Return the number of remaining weights after each round.

    Round k keeps ``total * (1 - rate)^k`` weights. The power is rounded once, so rounding errors do
    not accumulate over the rounds. The last round reaches ``sparsity`` exactly.

    Args:
        total: Number of weights.
        sparsity: Fraction of the weights that are zero at the end, in (0, 1).
        rate: Fraction of the remaining weights that one round removes, in (0, 1).

    >>> kept_by_round(1000, 0.3)
    [900, 810, 729, 700]
    """
    last = round(total * (1 - sparsity))
    kept: list[int] = []
    while not kept or kept[-1] > last:
        left = round(total * (1 - rate) ** (len(kept) + 1))
        # Avoid a last round that would remove a single weight because of rounding.
        kept.append(left if left > last + 1 else last)
    return kept


@torch.no_grad()
def keep_largest(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], keep: int
) -> dict[str, Tensor]:
    """Return masks that keep the ``keep`` largest of the remaining weights.

    The criterion is the absolute value (Han et al. 2015), compared over all layers (Frankle and
    Carbin 2019). Of equal values the earlier is removed first, in the order of ``weights`` and
    row-major in each weight, so that the count is exact.

    Args:
        weights: Map of name to weight, of any shape.
        masks: Map of name to bool of the weight's shape, True where the weight remains.
        keep: Number of weights to keep, at most the number of remaining ones.

    Returns:
        Map of name to bool; False wherever ``masks`` is False.

    Raises:
        ValueError: Fewer than ``keep`` weights remain.
    """
    left = sum(int(masks[name].sum()) for name in weights)
    if not 0 <= keep <= left:
        raise ValueError(f"{keep} weights cannot be kept of the {left} that remain")
    kept = {name: masks[name].clone() for name in weights}
    if keep == left:
        return kept
    # [left], the values of the remaining weights
    # float32 for all: the layers may have different dtypes, and half values are exact in it
    sizes = torch.cat([w.detach().abs()[masks[n]].float().cpu() for n, w in weights.items()])
    # The largest value to remove; ``ties`` of the weights with this value are removed.
    # kthvalue counts from 1 and selects without sorting all weights.
    limit = float(sizes.kthvalue(left - keep).values)
    ties = left - keep - int((sizes < limit).sum())
    for name, weight in weights.items():
        size = weight.detach().abs().float()
        same = (masks[name] & (size == limit)).flatten().nonzero().flatten()[:ties]
        kept[name] &= ~(size < limit)  # unlike >=, this keeps nan
        kept[name].view(-1)[same] = False
        ties -= len(same)  # the next weights remove what is left of the count
    return kept
