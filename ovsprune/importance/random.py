"""Random order: the baseline that every table needs."""

from __future__ import annotations

import torch

from ovsprune.core.protocols import GroupContext, Ranking
from ovsprune.importance import CRITERIA

__all__ = ["Random"]


@CRITERIA.register("random")
class Random:
    """Units in random order (baseline)."""

    needs: frozenset[str] = frozenset()

    def score(self, ctx: GroupContext) -> Ranking:
        """A random permutation; a unit's cost is its place in it."""
        order = torch.randperm(ctx.group.units, generator=ctx.generator)
        return Ranking(torch.argsort(order).double(), order)
