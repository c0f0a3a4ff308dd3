"""Ranking of units across groups, each group in its fixed order of removal.

Each group has a list of steps from its minimum width to its dense width. A step keeps the units
that would be removed last. Its price is the MACs (or other cost) that these units add; its worth is
the sum of their importance scores divided by the price.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ovsprune.allocation.trim import spare_budget, trim, widths_of
from ovsprune.core.protocols import AllocationContext
from ovsprune.core.records import Group

__all__ = ["WidthSteps", "select_steps", "width_steps"]

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class WidthSteps:
    """Steps of one group from its minimum to its maximum width.

    Attributes:
        widths: int64 [k + 1], ascending: the allowed widths.
        prices: float64 [k], > 0: cost added by each step, in the unit of the budget.
        worths: float64 [k], non-increasing: importance per price of the units that a step adds.
        floor: Cost of the minimum width.
        mean: Importance per price of the whole group.
    """

    widths: NDArray[np.int64]
    prices: Array
    worths: Array
    floor: float
    mean: float


def width_steps(ctx: AllocationContext, group: Group) -> WidthSteps:
    """Build the steps of ``group``.

    Scores are made monotone along the order of removal (running maximum): a unit that is removed
    later is worth no less than those before it. Steps whose worth per price exceeds that of a
    narrower step are merged with it (concave hull of score over price), so that sorting by worth
    never selects a step before the narrower ones.
    """
    order = ctx.scores.orders[group.name].cpu().numpy()
    costs = ctx.scores.costs[group.name].double().cpu().numpy()[order]
    # removed[k]: total score of the k units that are removed first
    removed = np.concatenate([[0.0], np.cumsum(np.maximum.accumulate(costs))])
    widths = np.array(widths_of(group, ctx.round_to))  # [k + 1]
    price = np.array([ctx.budget.price(group, int(w)) for w in widths])  # [k + 1]
    # A step that costs nothing gets a tiny price, because worths are divided by it.
    prices = np.maximum(np.diff(price), 1e-15 * ctx.budget.dense)
    values = -np.diff(removed[group.units - widths])  # [k], score of the units of each step
    total = ctx.budget.price(group, group.units) - ctx.budget.price(group, 0)
    return WidthSteps(
        widths=widths,
        prices=prices,
        worths=_isotonic(values, prices),
        floor=float(price[0]) - ctx.budget.price(group, 0),
        mean=float(removed[-1]) / max(total, 1e-15 * ctx.budget.dense),
    )


def select_steps(
    ctx: AllocationContext, steps: Mapping[str, WidthSteps], worths: Mapping[str, Array]
) -> dict[str, int]:
    """Take the steps of highest worth over all groups until no more fits the budget.

    Args:
        ctx: Allocation context.
        steps: Steps of every group.
        worths: float64 [k] per group, non-increasing: worth of its steps, comparable across groups.

    Raises:
        BudgetError: The minimum widths cost more than the budget.
    """
    left = spare_budget(ctx)
    names = [g.name for g in ctx.groups]
    lengths = [len(worths[n]) for n in names]
    if not sum(lengths):
        return {n: int(steps[n].widths[-1]) for n in names}
    # Steps of all groups in one array; owner is the index of each step's group.
    owner = np.repeat(np.arange(len(names)), lengths)  # [steps]
    # Stable sort: steps of one group with equal worth stay in ascending order of width.
    ranked = np.argsort(-np.concatenate([worths[n] for n in names]), kind="stable")
    spent = np.cumsum(np.concatenate([steps[n].prices for n in names])[ranked])
    taken = ranked[: int(np.searchsorted(spent, left + 1e-9 * ctx.budget.dense, side="right"))]
    counts = np.bincount(owner[taken], minlength=len(names))  # [groups], steps taken
    widths = {n: int(steps[n].widths[k]) for n, k in zip(names, counts, strict=True)}

    def worth(group: Group, now: int, wider: int) -> float:
        return float(worths[group.name][int(np.searchsorted(steps[group.name].widths, now))])

    return trim(ctx, widths, worth)


def _isotonic(values: Array, prices: Array) -> Array:
    """Return values per price, made non-increasing by pooling adjacent violators."""
    pools: list[tuple[float, float, int]] = []  # (value, price, number of steps)
    for value, price in zip(values.tolist(), prices.tolist(), strict=True):
        pool = (value, price, 1)
        while pools and pool[0] * pools[-1][1] > pools[-1][0] * pool[1]:
            before = pools.pop()
            pool = (before[0] + pool[0], before[1] + pool[1], before[2] + pool[2])
        pools.append(pool)
    return np.repeat([v / p for v, p, _ in pools], [n for _, _, n in pools]).astype(np.float64)
