"""Sensitivity: widths of least total measured change, by dynamic programming."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ovsprune.allocation import ALLOCATIONS
from ovsprune.allocation.curves import curve
from ovsprune.allocation.trim import floor_of, spare, trim, widths_of
from ovsprune.core.protocols import AllocationContext
from ovsprune.core.records import Group

__all__ = ["Sensitivity"]

_BINS = 4000
"""Steps into which the budget is divided; single units make up for what rounding leaves."""
_OPTIONS = 96
"""Most widths of one group that the dynamic programme looks at."""

Array = NDArray[np.float64]


@ALLOCATIONS.register("sensitivity")
class Sensitivity:
    """Widths of least total measured change of the tower's features (dynamic programme)."""

    needs_curves = True
    needs_spectra = False

    def widths(self, ctx: AllocationContext) -> dict[str, int]:
        """Solve the multiple-choice knapsack over the measured curves, then trim by single units.

        The change of all groups together is taken as the sum of each one's change alone, as in
        ZipLM (Kurtic et al. 2023) and the additive models before it.

        Raises:
            BudgetError: The floors cost more than the budget.
        """
        left = spare(ctx)
        curves = {g.name: curve(ctx, g) for g in ctx.groups}
        options = {g.name: _thin(widths_of(g, ctx.round_to)) for g in ctx.groups}
        bin_size = max(left / _BINS, 1e-9)
        best = np.zeros(_BINS + 1)
        choices: list[NDArray[np.int64]] = []
        for group in ctx.groups:
            best, choice = _add(ctx, group, options[group.name], curves[group.name], best, bin_size)
            choices.append(choice)
        widths, at = {}, _BINS
        for group, choice in zip(reversed(ctx.groups), reversed(choices), strict=True):
            widths[group.name] = options[group.name][int(choice[at])]
            at -= _bins(ctx, group, widths[group.name], bin_size)

        def worth(group: Group, now: int, wider: int) -> float:
            price = ctx.budget.price(group, wider) - ctx.budget.price(group, now)
            return float(curves[group.name][now] - curves[group.name][wider]) / max(price, 1e-12)

        return trim(ctx, widths, worth)


def _thin(widths: list[int]) -> list[int]:
    if len(widths) <= _OPTIONS:
        return widths
    places = np.unique(np.linspace(0, len(widths) - 1, _OPTIONS).round().astype(int))
    return [widths[p] for p in places]


def _bins(ctx: AllocationContext, group: Group, width: int, bin_size: float) -> int:
    """Bins that a width costs above the group's floor, rounded up: never over the budget."""
    price = ctx.budget.price
    above = price(group, width) - price(group, floor_of(group, ctx.round_to))
    return int(np.ceil(above / bin_size - 1e-9))


def _add(
    ctx: AllocationContext,
    group: Group,
    options: list[int],
    errors: Array,
    best: Array,
    bin_size: float,
) -> tuple[Array, NDArray[np.int64]]:
    """Least error for every budget once this group is there too, and the option that gives it."""
    table = np.full((len(options), len(best)), np.inf)
    for row, width in enumerate(options):
        used = _bins(ctx, group, width, bin_size)
        if used < len(best):
            table[row, used:] = best[: len(best) - used] + errors[width]
    choice = table.argmin(0)
    return table[choice, np.arange(len(best))], choice
