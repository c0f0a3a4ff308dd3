"""Allocators: turn scores or error curves and a budget into widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ovsprune.core.records import (
    Curves,
    Group,
    Scores,
)

__all__ = ["AllocationContext", "Allocator", "Budget"]


@dataclass(frozen=True)
class Budget:
    """What must remain.

    Attributes:
        kind: ``"macs"``, ``"params"`` or ``"latency"``.
        dense: Cost of the dense tower (MACs, parameters, or milliseconds).
        target: Cost that must remain.
        tables: Group name to the group's cost at every width 0 ... units, where the cost is no
            multiple of the units: a latency that was measured. Never falls with the width.
    """

    kind: str
    dense: float
    target: float
    tables: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def price(self, group: Group, width: int) -> float:
        """What keeping ``width`` units of ``group`` costs, in this budget's currency."""
        table = self.tables.get(group.name)
        if table is not None:
            return float(table[width])
        return width * (group.params if self.kind == "params" else group.macs)

    def together(self, group: Group, other: Group) -> float:
        """What one unit of each costs together, which :meth:`price` of either counts as its own.

        0 where ``group.shared`` does not name ``other``. Of a latency, which is measured of each
        group alone, it is the share of the MACs, in the mean time that a MAC of theirs takes.
        """
        shared = group.shared.get(other.name)
        if shared is None:
            return 0.0
        if self.kind != "latency":
            return float(shared.of(self.kind))
        times = [self.price(g, g.units) / (g.units * g.macs) for g in (group, other)]
        return shared.macs * sum(times) / 2


@dataclass(frozen=True, eq=False)
class AllocationContext:
    """What an allocator sees: groups that may be cut, their scores, the budget, measurements.

    Attributes:
        groups: Groups that may be cut.
        scores: Costs and orders of their units.
        budget: What must remain.
        curves: Error by width; None unless the allocator says ``needs_curves``.
        round_to: Units of one column stay in multiples of this.
        spectra: Group name to the power-law exponent alpha of its layers' spectra, > 1; None
            unless the allocator says ``needs_spectra``.
        comparable: The criterion's costs mean the same in every group (a change of one loss), so
            that a ranking over all groups takes them as they are.
    """

    groups: Sequence[Group]
    scores: Scores
    budget: Budget
    curves: Curves | None
    round_to: int = 1
    spectra: Mapping[str, float] | None = None
    comparable: bool = False


class Allocator(Protocol):
    """Turns scores or curves and a budget into widths."""

    needs_curves: bool
    needs_spectra: bool

    def widths(self, ctx: AllocationContext) -> dict[str, int]:
        """Units to keep in each group, at most the budget and within one unit of it.

        Raises:
            BudgetError: The floors cost more than the budget; names the nearest ratio.
        """
        ...
