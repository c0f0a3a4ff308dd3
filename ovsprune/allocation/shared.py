"""Groups whose costs multiply, around any allocator.

Of a bottleneck's convolution that reads one group's units and makes another's, the cost is the
product of both widths. An allocator's prices are a sum. So it is given the prices that hold near a
point, where a unit costs what it costs with the other group as narrow as it is there (sequential
linear programming, Nocedal and Wright, Numerical Optimization, 2006, section 18.1), and its answer
moves the point. With costs ``sum_g p_g w_g`` less what is counted twice, ``sum b d_g d_h`` over the
pairs that share, d being the units that are gone, the prices at ``d*`` are ``p_g - sum_h b d*_h``.
At the end the true cost decides: the target that the allocator is shown is bisected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ovsprune.allocation.trim import cost, fill, floor_of, partners, spare, trim
from ovsprune.core.protocols import AllocationContext, Allocator
from ovsprune.core.records import Group

__all__ = ["Shared"]

ROUNDS = 6
"""How often the point moves, each time half of the way to the allocator's answer."""
BISECTIONS = 12

Widths = dict[str, int]


class Shared:
    """An allocator that knows what groups cost together; itself where they share nothing.

    Args:
        allocator: Whose prices are a sum.
    """

    def __init__(self, allocator: Allocator) -> None:
        self.allocator = allocator
        self.needs_curves, self.needs_spectra = allocator.needs_curves, allocator.needs_spectra

    def widths(self, ctx: AllocationContext) -> Widths:
        """Units to keep in each group, at most the budget and within one unit of it.

        Raises:
            BudgetError: The floors cost more than the budget.
        """
        if not partners(ctx):
            return self.allocator.widths(ctx)
        spare(ctx)
        point: Mapping[str, float] = fill(
            ctx,
            lambda part: {
                g.name: max(floor_of(g, ctx.round_to), round(part * g.units)) for g in ctx.groups
            },
        )[1]
        for _ in range(ROUNDS):
            found = self.allocator.widths(_linear(ctx, point))
            point = {name: (at + found[name]) / 2 for name, at in point.items()}
        return self._exact(ctx, point)

    def _exact(self, ctx: AllocationContext, point: Mapping[str, float]) -> Widths:
        """The allocator's widths for the highest target that truly keeps the budget."""
        shown = _linear(ctx, point)
        floors = {g.name: floor_of(g, ctx.round_to) for g in ctx.groups}
        least, most = cost(shown, floors), shown.budget.dense
        fits, beyond = floors, {g.name: g.units for g in ctx.groups}
        target = min(max(ctx.budget.target, least), most)
        for _ in range(BISECTIONS):
            found = self.allocator.widths(
                replace(shown, budget=replace(shown.budget, target=target))
            )
            if cost(ctx, found) <= ctx.budget.target:
                least, fits = target, found
            else:
                most, beyond = target, found
            target = (least + most) / 2

        def missing(group: Group, now: int, wider: int) -> float:
            return (beyond[group.name] - now) / group.units

        return trim(ctx, fits, missing)


def _linear(ctx: AllocationContext, point: Mapping[str, float]) -> AllocationContext:
    """The same, with prices that are a sum, and true at the widths ``point``."""
    shared, budget = partners(ctx), ctx.budget
    gone = {g.name: g.units - point[g.name] for g in ctx.groups}
    away = {
        name: sum(gone[other.name] * price for other, price in found)
        for name, found in shared.items()
    }
    tables = {}
    for group in ctx.groups:
        widths = np.arange(group.units + 1)
        prices = np.array([budget.price(group, int(width)) for width in widths])
        # Measured prices may fall with the width then; a price never does.
        now = prices - away.get(group.name, 0.0) * widths
        tables[group.name] = np.maximum.accumulate(now).tolist()
    twice = sum(gone[name] * part for name, part in away.items()) / 2
    return replace(
        ctx,
        groups=[replace(group, shared={}) for group in ctx.groups],
        budget=replace(budget, dense=budget.dense - twice, tables=tables),
    )
