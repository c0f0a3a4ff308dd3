"""Allocators: turn scores or error curves and a budget into widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ovsprune.core.records import Curves, Group, Scores

__all__ = ["AllocationContext", "Allocator", "Budget"]


@dataclass(frozen=True)
class Budget:
    """Cost limit of the pruned tower.

    Attributes:
        kind: ``"macs"``, ``"params"`` or ``"latency"``.
        dense: Cost of the dense tower (MACs, parameters, or milliseconds).
        target: Largest cost of the pruned tower, in the same unit.
        tables: Group name to the cost of the group at each width 0, ..., units. Used for measured
            latencies, which are not proportional to the width. Each table is non-decreasing.
    """

    kind: str
    dense: float
    target: float
    tables: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def price(self, group: Group, width: int) -> float:
        """Return the cost of keeping ``width`` units of ``group``, in the unit of the budget."""
        table = self.tables.get(group.name)
        if table is not None:
            return float(table[width])
        return width * (group.params if self.kind == "params" else group.macs)

    def shared_cost(self, group: Group, other: Group) -> float:
        """Return the cost that one unit of each group shares, which :meth:`price` counts twice.

        It is 0 if ``group.shared`` does not contain ``other``. A latency is measured for each
        group separately, so the shared latency is estimated: the shared MACs times the mean
        latency per MAC of the two groups.
        """
        shared = group.shared.get(other.name)
        if shared is None:
            return 0.0
        if self.kind != "latency":
            return float(shared.of(self.kind))
        # Milliseconds per MAC of either group at full width.
        times = [self.price(g, g.units) / (g.units * g.macs) for g in (group, other)]
        return shared.macs * sum(times) / 2


@dataclass(frozen=True, eq=False)
class AllocationContext:
    """Inputs of an allocator.

    Attributes:
        groups: Groups that may be pruned.
        scores: Importance scores and removal orders of their units.
        budget: Cost limit.
        curves: Error by width; None unless the allocator sets ``needs_curves``.
        round_to: Widths of groups whose units are single columns are multiples of this.
        spectra: Group name to the power-law exponent alpha of its layers' spectra, > 1; None
            unless the allocator sets ``needs_spectra``.
        comparable: True if the criterion's costs have the same scale in every group (for example,
            the estimated change of one loss). A global ranking then uses them without
            normalisation.
    """

    groups: Sequence[Group]
    scores: Scores
    budget: Budget
    curves: Curves | None
    round_to: int = 1
    spectra: Mapping[str, float] | None = None
    comparable: bool = False


class Allocator(Protocol):
    """Choice of the width of every group under a budget."""

    needs_curves: bool
    """True if :attr:`AllocationContext.curves` must be measured."""
    needs_spectra: bool
    """True if :attr:`AllocationContext.spectra` must be computed."""

    def widths(self, ctx: AllocationContext) -> dict[str, int]:
        """Return the number of units to keep in each group.

        Their cost is at most the budget, and one more unit would exceed it.

        Raises:
            BudgetError: The minimum widths cost more than the budget; the message names the
                nearest ratio that can be reached.
        """
        ...
