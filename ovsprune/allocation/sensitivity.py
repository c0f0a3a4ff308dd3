"""Sensitivity: widths of least total measured error, by dynamic programming."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ovsprune.allocation import ALLOCATIONS
from ovsprune.allocation.curves import error_curve
from ovsprune.allocation.trim import floor_of, spare_budget, trim, widths_of
from ovsprune.core.protocols import AllocationContext
from ovsprune.core.records import Group

__all__ = ["Sensitivity"]

_BINS = 4000
"""Number of bins of the budget. Rounding errors are corrected unit by unit afterwards."""
_OPTIONS = 96
"""Maximum number of candidate widths per group."""

Array = NDArray[np.float64]


@ALLOCATIONS.register("sensitivity")
class Sensitivity:
    """Widths of least total measured change of the tower's features (dynamic programme)."""

    needs_curves = True
    needs_spectra = False

    def widths(self, ctx: AllocationContext) -> dict[str, int]:
        """Solve the multiple-choice knapsack over the measured curves, then add single units.

        The error of pruning all groups is approximated by the sum of the errors of pruning each
        group alone, as in ZipLM (Kurtic et al. 2023).
        """
        left = spare_budget(ctx)
        curves = {g.name: error_curve(ctx, g) for g in ctx.groups}
        options = {g.name: _thin(widths_of(g, ctx.round_to)) for g in ctx.groups}
        bin_size = max(left / _BINS, 1e-9)
        best = np.zeros(_BINS + 1)  # best[j]: least total error at a budget of j bins
        choices: list[NDArray[np.int64]] = []
        for group in ctx.groups:
            best, choice = _add(ctx, group, options[group.name], curves[group.name], best, bin_size)
            choices.append(choice)
        # Walk the choices back from the full budget: the position is the budget that is left.
        widths, position = {}, _BINS
        for group, choice in zip(reversed(ctx.groups), reversed(choices), strict=True):
            widths[group.name] = options[group.name][int(choice[position])]
            position -= _bins(ctx, group, widths[group.name], bin_size)

        def worth(group: Group, now: int, wider: int) -> float:
            price = ctx.budget.price(group, wider) - ctx.budget.price(group, now)
            return float(curves[group.name][now] - curves[group.name][wider]) / max(price, 1e-12)

        return trim(ctx, widths, worth)


def _thin(widths: list[int]) -> list[int]:
    """Return at most ``_OPTIONS`` of the widths, evenly spaced, with both ends."""
    if len(widths) <= _OPTIONS:
        return widths
    indices = np.unique(np.linspace(0, len(widths) - 1, _OPTIONS).round().astype(int))
    return [widths[i] for i in indices]


def _bins(ctx: AllocationContext, group: Group, width: int, bin_size: float) -> int:
    """Return the cost of a width above the group's minimum, in bins rounded up."""
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
    """Add one group, with its candidate widths and errors [units + 1], to the dynamic program.

    ``best`` [bins + 1] is the least total error of the groups so far for every budget. Returns the
    least total error with this group, and the index of the option chosen, both for every budget.
    """
    # table[i, j]: least error if the group gets option i and the budget is j bins.
    table = np.full((len(options), len(best)), np.inf)  # [options, bins + 1]
    for row, width in enumerate(options):
        used = _bins(ctx, group, width, bin_size)
        if used < len(best):
            table[row, used:] = best[: len(best) - used] + errors[width]
    choice = table.argmin(0)
    return table[choice, np.arange(len(best))], choice
