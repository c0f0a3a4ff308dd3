"""Budget of a prune, and the cost of a plan in the budget's prices."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ovsprune.allocation.trim import cost
from ovsprune.core.progress import Progress
from ovsprune.core.protocols import AllocationContext, Budget, Family
from ovsprune.core.records import Costs, Group, Plan, Scores
from ovsprune.profiling.latency import latency_budget
from ovsprune.pruning.config import PruneConfig

__all__ = ["counted_budget", "plan_cost", "timed_budget"]


def counted_budget(kind: str, base: Costs, current: Costs, ratio: float) -> Budget:
    """Return the budget of a tower in MACs or parameters.

    Args:
        kind: ``"macs"`` or ``"params"``.
        base: Costs of the dense tower.
        current: Costs of the tower as it is; equal to ``base`` before the first cut.
        ratio: Fraction of the base's cost to remove, in (0, 1).
    """
    return Budget(kind, float(current.of(kind)), base.of(kind) * (1 - ratio))


def timed_budget(
    tower: nn.Module,
    groups: Sequence[Group],
    family: Family,
    size: tuple[int, int],
    config: PruneConfig,
    progress: Progress,
) -> Budget:
    """Return the budget of a dense tower in milliseconds, from the table of layer times.

    Args:
        tower: Rewritten dense tower.
        groups: Groups that may be cut.
        family: Family of the tower.
        size: Height and width of the images in pixels.
        config: Gives the ratio and the file of layer times.
        progress: Progress reporter.

    Raises:
        DataError: The file of layer times cannot be used.
    """
    return latency_budget(tower, groups, family, size, config.ratio, config.latency_table, progress)


def plan_cost(groups: Sequence[Group], budget: Budget, plan: Plan) -> float:
    """Return the cost of the tower that a plan leaves, in the unit of the budget."""
    ctx = AllocationContext(groups, Scores({}, {}), budget, None)
    return cost(ctx, {g.name: plan.width(g.name) for g in groups})
