"""Global magnitude: the smallest weights of all layers together go first."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["RATE", "keep_largest", "kept_by_round"]

RATE = 0.1
"""Share of what remains that goes in a round."""


def kept_by_round(total: int, sparsity: float, rate: float = RATE) -> list[int]:
    """How many of ``total`` stay after each round, until ``sparsity`` is reached.

    Round k leaves ``total * (1 - rate)^k``, rounded once and not round by round, so that it is
    exact to one; the last round goes as far as ``sparsity`` and no further.

    Args:
        total: Number of weights.
        sparsity: Share that is zero at the end, in (0, 1).
        rate: Share of what remains that goes in a round, in (0, 1).

    >>> kept_by_round(1000, 0.3)
    [900, 810, 729, 700]
    """
    last = round(total * (1 - sparsity))
    kept: list[int] = []
    while not kept or kept[-1] > last:
        left = round(total * (1 - rate) ** (len(kept) + 1))
        kept.append(left if left > last + 1 else last)  # no round of its own for a rounding
    return kept


@torch.no_grad()
def keep_largest(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], keep: int
) -> dict[str, Tensor]:
    """Masks in which the ``keep`` largest of the weights that are left stay.

    L1 over all layers together (Han et al. 2015; globally, as Frankle and Carbin 2019). Of weights
    of one size the earlier goes first, in the order of ``weights`` and row-major in each, so that
    the count is exact.

    Args:
        weights: Name to weight, of any shape.
        masks: Name to bool of the weight's shape, True where the weight is left.
        keep: How many stay, at most as many as are left.

    Returns:
        Name to bool, True in no place where ``masks`` is False.

    Raises:
        ValueError: Fewer than ``keep`` are left.
    """
    left = sum(int(masks[name].sum()) for name in weights)
    if not 0 <= keep <= left:
        raise ValueError(f"{keep} weights cannot be kept of the {left} that are left")
    found = {name: masks[name].clone() for name in weights}
    if keep == left:
        return found
    sizes = torch.cat([w.detach().abs()[masks[n]].float().cpu() for n, w in weights.items()])
    limit = float(sizes.kthvalue(left - keep).values)
    ties = left - keep - int((sizes < limit).sum())
    for name, weight in weights.items():
        size = weight.detach().abs().float()
        same = (masks[name] & (size == limit)).flatten().nonzero().flatten()[:ties]
        found[name] &= ~(size < limit)  # not >=, which would lose what is not a number
        found[name].view(-1)[same] = False
        ties -= len(same)
    return found
