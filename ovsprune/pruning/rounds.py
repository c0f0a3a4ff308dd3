"""Iterative pruning: ratio of every round, and plans in the coordinates of the dense model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ovsprune.core.records import Group, Plan

__all__ = ["compose", "keep_all", "ratios", "reindex_groups"]


def ratios(ratio: float, rounds: int) -> list[float]:
    """Return the ratio after every round; each round removes the same fraction of what remains.

    After round k of N, ``(1 - ratio)^(k/N)`` of the cost remains; the last entry is ``ratio``
    itself (geometric, as in iterative magnitude pruning: Frankle and Carbin, ICLR 2019).

    Example:
        >>> [round(r, 3) for r in ratios(0.75, 2)]
        [0.5, 0.75]
    """
    return [1 - (1 - ratio) ** (k / rounds) for k in range(1, rounds)] + [ratio]


def keep_all(groups: Sequence[Group]) -> Plan:
    """Return the plan that keeps every unit."""
    return Plan({g.name: torch.arange(g.units) for g in groups})


def compose(first: Plan, then: Plan) -> Plan:
    """Return two successive plans as one, in dense coordinates.

    ``then`` is in the coordinates of the units that ``first`` kept.
    """
    # A group that an earlier round emptied is not in the later plan.
    kept = {n: units[then.kept[n]] if n in then.kept else units for n, units in first.kept.items()}
    return Plan(kept)


def reindex_groups(groups: Sequence[Group], plan: Plan) -> list[Group]:
    """Return the groups of the tower that was cut by ``plan``, in its own coordinates.

    A cut places the rows of the kept units next to each other, so they are numbered from 0. The
    costs per unit are not updated (:func:`ovsprune.graph.groups.with_costs` counts them again).
    A group that lost all its units is left out.
    """
    return [_reindexed(g, plan.kept[g.name]) for g in groups if plan.width(g.name)]


def _reindexed(group: Group, kept: Tensor) -> Group:
    width = len(kept)
    if width == group.units:
        return group
    slices = tuple(
        # rows: [width, channels per unit]
        replace(part, rows=torch.arange(width * part.rows.shape[1]).view(width, -1))
        for part in group.slices
    )
    return replace(group, units=width, slices=slices, min_units=min(group.min_units, width))
