"""Spectral: removes more units where the weights' spectra have lighter tails (AlphaPruning)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ovsprune.allocation import ALLOCATIONS
from ovsprune.allocation.trim import largest_fit, round_width, spare_budget, trim, widths_of
from ovsprune.core.protocols import AllocationContext
from ovsprune.core.records import Group

__all__ = ["SPREAD", "Spectral"]

SPREAD = 0.3
"""Relative half-width of the interval [s1, s2] = [0.7, 1.3] of the fractions removed, as
AlphaPruning's code uses with magnitude pruning."""


@ALLOCATIONS.register("spectral")
class Spectral:
    """Removes more from layers whose spectra have a larger power-law alpha (AlphaPruning)."""

    needs_curves = False
    needs_spectra = True

    def widths(self, ctx: AllocationContext) -> dict[str, int]:
        """Remove the fraction ``eta ((a_i - a_min) / (a_max - a_min) (s2 - s1) + s1)`` of group i.

        Lu et al. 2024 (NeurIPS, AlphaPruning), section 3.2, with ``[s1, s2] = [1 - SPREAD,
        1 + SPREAD]`` and fractions capped at 1. ``eta`` is found by bisection so that the budget
        holds. Units left over by rounding go to the groups furthest below their fraction.
        """
        assert ctx.spectra is not None
        spare_budget(ctx)
        options = {g.name: widths_of(g, ctx.round_to) for g in ctx.groups}
        slopes = _slopes(ctx.groups, ctx.spectra)

        def kept(part: float, name: str) -> float:
            # At part 0 the smallest fraction removed is 1: every group is at its minimum width.
            return max(0.0, 1 - (1 - part) * slopes[name] / (1 - SPREAD))

        part, widths = largest_fit(
            ctx,
            lambda part: {
                g.name: round_width(g, options[g.name], kept(part, g.name)) for g in ctx.groups
            },
        )
        return trim(ctx, widths, lambda g, now, wider: kept(part, g.name) - now / g.units)


def _slopes(groups: Sequence[Group], spectra: Mapping[str, float]) -> dict[str, float]:
    """Map alphas linearly to [1 - SPREAD, 1 + SPREAD]; to 1 if all are equal.

    An infinite alpha (no power law fits) counts as the largest finite one.
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
