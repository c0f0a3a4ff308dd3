"""Spectral: more is cut where the weights' spectra have lighter tails (AlphaPruning)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ovsprune.allocation import ALLOCATIONS
from ovsprune.allocation.trim import fill, place, spare, trim, widths_of
from ovsprune.core.protocols import AllocationContext
from ovsprune.core.records import Group

__all__ = ["SPREAD", "Spectral"]

SPREAD = 0.3
"""Half the width of the interval of the shares, relative to its middle: the shares lie in [s1, s2]
= [0.7, 1.3] times the target, as where AlphaPruning's code prunes by magnitude."""


@ALLOCATIONS.register("spectral")
class Spectral:
    """More from layers whose weights' spectra have a larger power-law alpha (AlphaPruning)."""

    needs_curves = False
    needs_spectra = True

    def widths(self, ctx: AllocationContext) -> dict[str, int]:
        """Remove of group i the share ``eta ((a_i - a_min) / (a_max - a_min) (s2 - s1) + s1)``.

        Lu et al. 2024 (NeurIPS, AlphaPruning), section 3.2, with ``[s1, s2] = [1 - SPREAD,
        1 + SPREAD]``; ``eta`` is found by bisection, so that the budget holds exactly in its own
        currency, and no share is above 1. What rounding leaves goes where most is missing.

        Raises:
            BudgetError: The floors cost more than the budget.
        """
        assert ctx.spectra is not None
        spare(ctx)
        options = {g.name: widths_of(g, ctx.round_to) for g in ctx.groups}
        slopes = _slopes(ctx.groups, ctx.spectra)

        def kept(part: float, name: str) -> float:
            # At part 0 the least share removed is 1: everything goes, down to the floors.
            return max(0.0, 1 - (1 - part) * slopes[name] / (1 - SPREAD))

        part, widths = fill(
            ctx,
            lambda part: {
                g.name: place(g, options[g.name], kept(part, g.name)) for g in ctx.groups
            },
        )
        return trim(ctx, widths, lambda g, now, wider: kept(part, g.name) - now / g.units)


def _slopes(groups: Sequence[Group], spectra: Mapping[str, float]) -> dict[str, float]:
    """Alphas mapped linearly to [1 - SPREAD, 1 + SPREAD]; 1 where all are the same.

    A spectrum that has no power law at all (an infinite alpha) counts as the largest that has one.
    """
    alphas = {g.name: spectra[g.name] for g in groups}
    finite = [a for a in alphas.values() if math.isfinite(a)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    if high - low < 1e-12:
        return dict.fromkeys(alphas, 1.0)
    return {
        name: 1 - SPREAD + 2 * SPREAD * (min(alpha, high) - low) / (high - low)
        for name, alpha in alphas.items()
    }
