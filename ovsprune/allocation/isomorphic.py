"""Isomorphic: ranking among groups of equal structure only."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np

from ovsprune.allocation import ALLOCATIONS
from ovsprune.allocation.ranking import Array, Ladder, ladder, spend
from ovsprune.core.protocols import AllocationContext
from ovsprune.core.records import Group

__all__ = ["Isomorphic"]


@ALLOCATIONS.register("isomorphic")
class Isomorphic:
    """Ranking within classes of groups of equal structure; every class loses the same share."""

    needs_curves = False
    needs_spectra = False

    def widths(self, ctx: AllocationContext) -> dict[str, int]:
        """Rank units inside each class; take the same share of each class's cost.

        Isomorphic Pruning (Fang et al., ECCV 2024): costs of different structures follow
        different distributions and are not compared; those of equal structures are, as they are.

        Raises:
            BudgetError: The floors cost more than the budget.
        """
        classes: dict[Hashable, dict[str, Ladder]] = {}
        for group in ctx.groups:
            classes.setdefault(_structure(group), {})[group.name] = ladder(ctx, group)
        ladders = {name: found for members in classes.values() for name, found in members.items()}
        worths = {
            name: place for members in classes.values() for name, place in _places(members).items()
        }
        return spend(ctx, ladders, worths)


def _structure(group: Group) -> Hashable:
    """What groups of one class share: the unit kind, the slices' shapes, a unit's parameters.

    A unit's parameters stand for the width of the layers across the cut.
    """
    slices = tuple((part.axis, tuple(part.rows.shape)) for part in group.slices)
    return group.kind, group.units, slices, len(group.norms), group.params


def _places(members: dict[str, Ladder]) -> dict[str, Array]:
    """Place of every step in its class, by worth: 1 for the best, falling with the share before it.

    The same threshold in every class then takes the same share of each class's cost.
    """
    prices = np.concatenate([found.prices for found in members.values()])
    worths = np.concatenate([found.worths for found in members.values()])
    floors = sum(found.floor for found in members.values())
    ranked = np.argsort(-worths, kind="stable")
    before = np.cumsum(prices[ranked]) - prices[ranked] / 2
    places = np.empty_like(prices)
    places[ranked] = 1 - (floors + before) / max(floors + float(prices.sum()), 1e-30)
    ends = np.cumsum([len(found.prices) for found in members.values()])
    return dict(zip(members, np.split(places, ends[:-1]), strict=True))
