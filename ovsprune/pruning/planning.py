"""Which units go: survey (or what an earlier one has found), budget, allocation."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ovsprune.allocation import ALLOCATIONS
from ovsprune.allocation.shared import Shared
from ovsprune.allocation.tied import tied_widths
from ovsprune.allocation.trim import cost
from ovsprune.calibration.statistics import (
    Statistics,
    read_statistics,
    statistics_file,
    write_statistics,
)
from ovsprune.calibration.survey import Survey
from ovsprune.core.clock import Clock
from ovsprune.core.progress import Progress
from ovsprune.core.protocols import AllocationContext, Backbone, Budget, Family, Pictures
from ovsprune.core.records import Costs, Curves, Group, Plan, Scores
from ovsprune.importance import criterion_name, find_criterion
from ovsprune.profiling.latency import latency_budget
from ovsprune.pruning.config import PruneConfig
from ovsprune.pruning.provenance import origin_of
from ovsprune.spectrum import group_alphas

__all__ = ["Planner", "Planning", "Surveys"]

Surveys = MutableMapping[Any, tuple[Scores, Curves | None, float]]
"""What surveys of one backbone found, and their seconds: shared by jobs that differ in ratio,
allocation or recovery."""

Planner = Callable[[nn.Module, list[Group], Budget, Pictures], Plan]
"""Chooses the units in place of criterion and allocation: (tower, groups, budget, pictures)."""


class Planning:
    """Chooses the units of one job.

    Args:
        backbone: What is pruned.
        family: Its family.
        settings: What decides the prune.
        progress: Is told how the work goes.
        clock: Keeps the seconds; a survey that is shared counts in full for each job.
        surveys: Surveys of the dense tower that are there already; new ones are added.
    """

    def __init__(
        self,
        backbone: Backbone,
        family: Family,
        settings: PruneConfig,
        progress: Progress,
        clock: Clock,
        surveys: Surveys,
    ) -> None:
        self.backbone, self.family, self.settings = backbone, family, settings
        self.progress, self.clock, self.surveys = progress, clock, surveys
        settings.check()
        self.criterion = find_criterion(settings.criterion)
        self.allocator = ALLOCATIONS.get(settings.allocation)
        self.spent = 0.0
        """What the last plan costs by the budget's own prices."""

    def budget(
        self, tower: nn.Module, groups: Sequence[Group], base: Costs, now: Costs, ratio: float
    ) -> Budget:
        """What must remain of the base, as a budget of the tower as it is now.

        Args:
            tower: The rewritten tower.
            groups: Its groups.
            base: Costs of the dense tower.
            now: Costs of this one.
            ratio: Share of the base that goes.
        """
        settings = self.settings
        if settings.budget == "latency":
            size, file = self.backbone.preprocess.size, settings.latency_table
            budget = latency_budget(tower, groups, self.family, size, ratio, file, self.progress)
            self.clock.lap("layer times")
            return budget
        whole, left = base.of(settings.budget), now.of(settings.budget)
        return Budget(settings.budget, float(left), whole * (1 - ratio))

    def plan(
        self, tower: nn.Module, groups: list[Group], budget: Budget, pictures: Pictures
    ) -> Plan:
        """The units that stay.

        Raises:
            BudgetError: The budget is out of reach.
        """
        scores, curves = self._survey(tower, groups, pictures)
        ctx = AllocationContext(
            groups,
            scores,
            budget,
            curves,
            self.settings.round_to,
            spectra=group_alphas(tower, groups, self.progress)
            if self.allocator.needs_spectra
            else None,
            comparable=getattr(self.criterion, "comparable", False),
        )
        allocator = Shared(self.allocator)
        tied = self.settings.uniform_heads
        widths = tied_widths(allocator, ctx) if tied else allocator.widths(ctx)
        kept = {
            g.name: scores.orders[g.name][g.units - widths[g.name] :].sort().values for g in groups
        }
        self.clock.lap("allocate")
        return Plan(kept)

    def account(self, groups: Sequence[Group], budget: Budget, plan: Plan) -> float:
        """Note in ``spent`` what a plan costs; the share of the dense cost that it takes."""
        ctx = AllocationContext(groups, Scores({}, {}), budget, None)
        self.spent = cost(ctx, {g.name: plan.width(g.name) for g in groups})
        return 1 - self.spent / budget.dense

    def dense_no_more(self) -> None:
        """The tower was cut: what was found of the dense one holds no longer."""
        self.surveys = {}
        self.settings = replace(self.settings, statistics=None)

    def _survey(
        self, tower: nn.Module, groups: list[Group], pictures: Pictures
    ) -> tuple[Scores, Curves | None]:
        """Rankings and curves, which depend neither on the ratio nor on the recovery."""
        probe = self.settings.probe_pictures if self.allocator.needs_curves else 0
        key = (self.settings.measurement_key(), probe)
        if key not in self.surveys:
            start = time.perf_counter()
            found = self._stored(tower, groups, pictures, probe)
            self.surveys[key] = (*found, time.perf_counter() - start)
        scores, curves, seconds = self.surveys[key]
        self.clock.add("survey", seconds)
        return scores, curves

    def _stored(
        self, tower: nn.Module, groups: list[Group], pictures: Pictures, probe: int
    ) -> tuple[Scores, Curves | None]:
        """From the file of statistics if there is one; otherwise measured, and kept there."""
        if self.settings.statistics is None:
            return self._measure(tower, groups, pictures, probe)
        path = Path(self.settings.statistics)
        if not path.is_file():
            statistics_file(path).check_place()
        origin = self._origin(groups, pictures, probe)
        if path.exists():
            stored = read_statistics(path, origin)
            self.progress.note(f"statistics from {path}: nothing is measured anew")
            return stored.scores, stored.curves
        scores, curves = self._measure(tower, groups, pictures, probe)
        write_statistics(path, Statistics(scores, curves, origin))
        return scores, curves

    def _measure(
        self, tower: nn.Module, groups: list[Group], pictures: Pictures, probe: int
    ) -> tuple[Scores, Curves | None]:
        return Survey(
            tower,
            self.family.stages(tower),
            groups,
            self.criterion,
            pictures,
            batch_size=self.settings.batch_size,
            ridge=self.settings.ridge,
            seed=self.settings.seed,
            probe=probe,
            progress=self.progress,
        ).run()

    def _origin(self, groups: Sequence[Group], pictures: Pictures, probe: int) -> dict[str, Any]:
        """Everything that a survey's numbers depend on."""
        return {
            **origin_of(self.backbone, pictures),
            "groups": {g.name: [g.units, g.min_units] for g in groups},
            "criterion": criterion_name(self.settings.criterion),
            "ridge": self.settings.ridge,
            "seed": self.settings.seed,
            "probe": probe,
        }
