"""Isomorphic: ranking among groups of equal structure."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from ovsprune.allocation import ALLOCATIONS
from ovsprune.allocation.ranking import Array, WidthSteps, select_steps, width_steps
from ovsprune.core.protocols import AllocationContext
from ovsprune.core.records import Group

__all__ = ["Isomorphic"]


@ALLOCATIONS.register("isomorphic")
class Isomorphic:
    """Ranking within classes of groups of equal structure; all classes lose the same fraction."""

    needs_curves = False
    needs_spectra = False

    def widths(self, ctx: AllocationContext) -> dict[str, int]:
        """Rank units within each class; remove the same fraction of each class's cost.

        Isomorphic Pruning (Fang et al., ECCV 2024): scores of different structures follow
        different distributions and are not compared. Scores of equal structures are compared
        without normalisation.
        """
        classes: dict[Hashable, dict[str, WidthSteps]] = {}
        for group in ctx.groups:
            classes.setdefault(_structure(group), {})[group.name] = width_steps(ctx, group)
        steps = {name: steps for members in classes.values() for name, steps in members.items()}
        worths = {
            name: values
            for members in classes.values()
            for name, values in _quantiles(members).items()
        }
        return select_steps(ctx, steps, worths)


def _structure(group: Group) -> Hashable:
    """Return the class of a group: unit kind, shapes of slices, parameters per unit."""
    # The parameters per unit represent the other dimension of the sliced weights.
    slices = tuple((part.axis, tuple(part.rows.shape)) for part in group.slices)
    return group.kind, group.units, slices, len(group.norms), group.params


def _quantiles(members: dict[str, WidthSteps]) -> dict[str, Array]:
    """Map each step's worth to 1 - (fraction of the class's cost ranked before it).

    One threshold for all classes then keeps the same fraction of each class's cost.
    """
    prices = np.concatenate([steps.prices for steps in members.values()])
    worths = np.concatenate([steps.worths for steps in members.values()])
    floors = sum(steps.floor for steps in members.values())  # cost that no step can remove
    ranked = np.argsort(-worths, kind="stable")
    before = np.cumsum(prices[ranked]) - prices[ranked] / 2
    # A step counts from its middle, so that no class is favoured by coarse steps.
    quantiles = np.empty_like(prices)
    quantiles[ranked] = 1 - (floors + before) / max(floors + float(prices.sum()), 1e-30)
    ends = np.cumsum([len(steps.prices) for steps in members.values()])
    return dict(zip(members, np.split(quantiles, ends[:-1]), strict=True))
