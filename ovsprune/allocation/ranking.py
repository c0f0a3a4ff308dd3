"""Ranking the units of many groups against each other, each group's in its own order of removal.

A group is a ladder from its floor to its dense width. Going up a step keeps the units that are
removed last; what that is worth is what removing them would cost, for what keeping them costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ovsprune.allocation.trim import spare, trim, widths_of
from ovsprune.core.protocols import AllocationContext
from ovsprune.core.records import Group

__all__ = ["Ladder", "ladder", "spend"]

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Ladder:
    """One group's steps.

    Attributes:
        widths: int64 [k + 1], ascending: the floor, ..., the widest that it may have.
        prices: [k]: what each step costs, > 0, in the budget's currency.
        worths: [k]: removal cost per price of the units that the step keeps; never rises.
        floor: What the floor costs.
        mean: Removal cost per price of the whole group.
    """

    widths: NDArray[np.int64]
    prices: Array
    worths: Array
    floor: float
    mean: float


def ladder(ctx: AllocationContext, group: Group) -> Ladder:
    """The steps of ``group``.

    Costs are made monotone along the order of removal (their running maximum): a unit that is
    removed later is worth no less than those before it. Where prices are no multiple of the units
    and a step is worth more than the one below it, the two are taken as one (the concave hull of
    the worth over the price), so that going by worth never asks for a step before the one below.
    """
    order = ctx.scores.orders[group.name].cpu().numpy()
    costs = ctx.scores.costs[group.name].double().cpu().numpy()[order]
    gone = np.concatenate([[0.0], np.cumsum(np.maximum.accumulate(costs))])
    widths = np.array(widths_of(group, ctx.round_to))
    price = np.array([ctx.budget.price(group, int(w)) for w in widths])
    prices = np.maximum(np.diff(price), 1e-15 * ctx.budget.dense)
    values = -np.diff(gone[group.units - widths])
    whole = ctx.budget.price(group, group.units) - ctx.budget.price(group, 0)
    return Ladder(
        widths,
        prices,
        _falling(values, prices),
        float(price[0]) - ctx.budget.price(group, 0),
        float(gone[-1]) / max(whole, 1e-15 * ctx.budget.dense),
    )


def spend(
    ctx: AllocationContext, ladders: Mapping[str, Ladder], worths: Mapping[str, Array]
) -> dict[str, int]:
    """Widths that go up the ladders, the worthiest step first, until nothing more fits.

    Args:
        ctx: The allocation.
        ladders: Of every group.
        worths: [k] of every group, never rising: what its steps are worth against all others.

    Raises:
        BudgetError: The floors cost more than the budget.
    """
    left = spare(ctx)
    names = [g.name for g in ctx.groups]
    lengths = [len(worths[n]) for n in names]
    if not sum(lengths):
        return {n: int(ladders[n].widths[-1]) for n in names}
    owner = np.repeat(np.arange(len(names)), lengths)
    # Stable: steps of one group that are worth the same stay in the order of the ladder.
    ranked = np.argsort(-np.concatenate([worths[n] for n in names]), kind="stable")
    spent = np.cumsum(np.concatenate([ladders[n].prices for n in names])[ranked])
    taken = ranked[: int(np.searchsorted(spent, left + 1e-9 * ctx.budget.dense, side="right"))]
    steps = np.bincount(owner[taken], minlength=len(names))
    widths = {n: int(ladders[n].widths[k]) for n, k in zip(names, steps, strict=True)}

    def worth(group: Group, now: int, wider: int) -> float:
        return float(worths[group.name][int(np.searchsorted(ladders[group.name].widths, now))])

    return trim(ctx, widths, worth)


def _falling(values: Array, prices: Array) -> Array:
    """Values per price, neighbours pooled until none is above the one before (isotonic)."""
    pools: list[tuple[float, float, int]] = []
    for value, price in zip(values.tolist(), prices.tolist(), strict=True):
        pool = (value, price, 1)
        while pools and pool[0] * pools[-1][1] > pools[-1][0] * pool[1]:
            before = pools.pop()
            pool = (before[0] + pool[0], before[1] + pool[1], before[2] + pool[2])
        pools.append(pool)
    return np.repeat([v / p for v, p, _ in pools], [n for _, _, n in pools]).astype(np.float64)
