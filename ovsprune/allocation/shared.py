"""Wrapper that lets any allocator handle groups whose costs multiply.

A convolution between two groups of a bottleneck costs the product of both widths, whereas
allocators assume that prices add up. The wrapper linearises the cost around a point and calls the
allocator repeatedly; each answer moves the point (sequential linear programming, Nocedal and
Wright, Numerical Optimization, 2006, section 18.1). Let ``d_g`` be the number of units removed from
group g. Removing them saves ``sum_g p_g d_g - sum b_gh d_g d_h`` over the pairs (g, h) that share a
cost, so the price of a unit at ``d*`` is ``p_g - sum_h b_gh d*_h``. Finally the target given to the
allocator is bisected until the exact cost meets the budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ovsprune.allocation.trim import (
    cost,
    largest_fit,
    minimum_widths,
    shared_costs,
    spare_budget,
    trim,
)
from ovsprune.core.protocols import AllocationContext, Allocator
from ovsprune.core.records import Group

__all__ = ["SharedCostAllocator"]

ROUNDS = 6
"""Number of linearisations; each moves the point halfway to the allocator's answer."""
BISECTIONS = 12
"""Bisections of the target given to the allocator."""

Widths = dict[str, int]


class SharedCostAllocator:
    """Allocator for groups that share costs; without shared costs, the given allocator.

    Args:
        allocator: Allocator that assumes additive prices.
    """

    def __init__(self, allocator: Allocator) -> None:
        self.allocator = allocator
        self.needs_curves, self.needs_spectra = allocator.needs_curves, allocator.needs_spectra

    def widths(self, ctx: AllocationContext) -> Widths:
        """Return the units to keep in each group, below the budget by less than one unit."""
        if not shared_costs(ctx):
            return self.allocator.widths(ctx)
        spare_budget(ctx)
        floors = minimum_widths(ctx)
        # Start at the largest equal fraction of all groups that fits the budget.
        _, start = largest_fit(
            ctx,
            lambda part: {g.name: max(floors[g.name], round(part * g.units)) for g in ctx.groups},
        )
        point: Mapping[str, float] = start
        for _ in range(ROUNDS):
            answer = self.allocator.widths(_linearised(ctx, point))
            point = {name: (width + answer[name]) / 2 for name, width in point.items()}
        return self._bisect_target(ctx, point)

    def _bisect_target(self, ctx: AllocationContext, point: Mapping[str, float]) -> Widths:
        """Return the allocator's widths for the highest target whose exact cost fits."""
        linear = _linearised(ctx, point)
        floors = minimum_widths(ctx)
        least, most = cost(linear, floors), linear.budget.dense
        fits, beyond = floors, {g.name: g.units for g in ctx.groups}
        target = min(max(ctx.budget.target, least), most)
        for _ in range(BISECTIONS):
            widths = self.allocator.widths(
                replace(linear, budget=replace(linear.budget, target=target))
            )
            if cost(ctx, widths) <= ctx.budget.target:
                least, fits = target, widths
            else:
                most, beyond = target, widths
            target = (least + most) / 2

        def missing(group: Group, now: int, wider: int) -> float:
            return (beyond[group.name] - now) / group.units

        return trim(ctx, fits, missing)


def _linearised(ctx: AllocationContext, point: Mapping[str, float]) -> AllocationContext:
    """Return the context with additive prices that are exact at the widths ``point``."""
    # Letters of the module: d* units removed, price b_gh that a unit of g and one of h share.
    shared, budget = shared_costs(ctx), ctx.budget
    removed = {g.name: g.units - point[g.name] for g in ctx.groups}  # d*
    discount = {  # sum_h b_gh d*_h
        name: sum(removed[other.name] * price for other, price in pairs)
        for name, pairs in shared.items()
    }
    tables = {}
    for group in ctx.groups:
        widths = np.arange(group.units + 1)
        prices = np.array([budget.price(group, int(width)) for width in widths])
        # The discount can make measured prices decrease with the width; allocators need monotone
        # prices.
        discounted = prices - discount.get(group.name, 0.0) * widths
        tables[group.name] = np.maximum.accumulate(discounted).tolist()
    # Every pair occurs in the discounts of both of its groups.
    twice = sum(removed[name] * part for name, part in discount.items()) / 2
    return replace(
        ctx,
        groups=[replace(group, shared={}) for group in ctx.groups],
        budget=replace(budget, dense=budget.dense - twice, tables=tables),
    )
