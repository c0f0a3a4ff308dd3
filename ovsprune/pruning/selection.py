"""Interface of what selects the units to keep.

There are three implementations: an importance criterion with an allocation
(:class:`ovsprune.pruning.criterion_selector.CriterionSelector`), iterative magnitude pruning
(:class:`ovsprune.baselines.imp_units.ImpSelector`) and Torch-Pruning
(:class:`ovsprune.baselines.torch_pruning_selector.TorchPruningSelector`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import nn

from ovsprune.core.protocols import Budget, Pictures
from ovsprune.core.records import Group, Plan

__all__ = ["Selection", "SelectionContext", "UnitSelector"]


@dataclass(frozen=True, eq=False, kw_only=True)
class SelectionContext:
    """Inputs of a selection.

    Attributes:
        tower: Rewritten tower; it must not be changed.
        groups: Groups that may be cut, in the tower's coordinates.
        budget: Cost that must remain.
        pictures: Calibration images.
        is_dense: True if the tower is the dense one. Measurements may then be shared with other
            prunes of the same model; in later rounds of a prune they may not.
    """

    tower: nn.Module
    groups: list[Group]
    budget: Budget
    pictures: Pictures
    is_dense: bool


@dataclass(frozen=True, eq=False)
class Selection:
    """Result of a selection.

    Attributes:
        plan: Units to keep, in the tower's coordinates.
        trained: Tower of the dense shape whose weights a selector trained; the pipeline cuts it
            instead of a copy of the given tower. None if the selector does not train.
    """

    plan: Plan
    trained: nn.Module | None = None


class UnitSelector(Protocol):
    """Selects the units to keep."""

    def select(self, ctx: SelectionContext) -> Selection:
        """Select units whose cost is at most the budget.

        Raises:
            BudgetError: The budget cannot be reached.
        """
        ...
