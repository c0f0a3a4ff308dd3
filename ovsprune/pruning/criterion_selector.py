"""Selection of units by an importance criterion and an allocation of the budget."""

from __future__ import annotations

import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from ovsprune.allocation import ALLOCATIONS
from ovsprune.allocation.shared import SharedCostAllocator
from ovsprune.allocation.tied import tied_widths
from ovsprune.backbones import FAMILIES
from ovsprune.calibration.statistics import (
    Statistics,
    read_statistics,
    statistics_file,
    write_statistics,
)
from ovsprune.calibration.survey import Survey
from ovsprune.core.clock import Clock
from ovsprune.core.progress import Progress
from ovsprune.core.protocols import AllocationContext, Backbone
from ovsprune.core.records import Curves, Plan, Scores
from ovsprune.importance import criterion_name, find_criterion
from ovsprune.pruning.config import PruneConfig
from ovsprune.pruning.provenance import origin_of
from ovsprune.pruning.search_space import min_units_by_group
from ovsprune.pruning.selection import Selection, SelectionContext
from ovsprune.spectrum import group_alphas

__all__ = ["CriterionSelector", "Surveys"]

Surveys = MutableMapping[Any, tuple[Scores, Curves | None, float]]
"""Scores, error curves and measuring seconds by configuration, all of one dense model.

Prunes that differ only in ratio, allocation or recovery share an entry."""


class CriterionSelector:
    """Ranks the units by a criterion and distributes the budget by an allocation.

    Args:
        backbone: Model to prune.
        config: Gives criterion, allocation and their options.
        progress: Progress reporter.
        clock: Receives the seconds; a shared survey counts in full for every prune.
        surveys: Surveys of the dense tower that exist already; new ones are added.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: PruneConfig,
        progress: Progress,
        clock: Clock,
        surveys: Surveys | None = None,
    ) -> None:
        self.backbone, self.config = backbone, config.for_model(backbone)
        self.family = FAMILIES.get(backbone.family)
        self.progress, self.clock = progress, clock
        self.surveys: Surveys = {} if surveys is None else surveys
        self.criterion = find_criterion(config.criterion)
        self.allocator = ALLOCATIONS.get(config.allocation)

    def select(self, ctx: SelectionContext) -> Selection:
        """Return the most important units of each group, within the budget."""
        scores, curves = self._survey(ctx)
        spectra = None
        if self.allocator.needs_spectra:
            spectra = group_alphas(ctx.tower, ctx.groups, self.progress)
        allocation = AllocationContext(
            groups=ctx.groups,
            scores=scores,
            budget=ctx.budget,
            curves=curves,
            round_to=self.config.round_to,
            spectra=spectra,
            comparable=getattr(self.criterion, "comparable", False),  # optional in a criterion
        )
        # Allocators assume that prices add up, but a layer between two groups costs their product.
        allocator = SharedCostAllocator(self.allocator)
        tied = self.config.uniform_heads
        widths = tied_widths(allocator, allocation) if tied else allocator.widths(allocation)
        # orders lists the units from the least to the most important: the last `width` stay.
        kept = {
            g.name: scores.orders[g.name][g.units - widths[g.name] :].sort().values
            for g in ctx.groups
        }
        self.clock.lap("allocate")
        return Selection(Plan(kept))

    def _survey(self, ctx: SelectionContext) -> tuple[Scores, Curves | None]:
        """Return rankings and error curves; they depend on neither the ratio nor the recovery."""
        probe = self.config.probe_pictures if self.allocator.needs_curves else 0
        start = time.perf_counter()
        if not ctx.is_dense:  # a tower between two rounds, which no other prune shares
            scores, curves = self._measure(ctx, probe)
            self.clock.add("survey", time.perf_counter() - start)
            return scores, curves
        # With probe = 0 no curves are measured; an allocator that needs them must not find that
        # entry.
        key = (self.config.measurement_key(), probe)
        if key not in self.surveys:
            measured = self._stored(ctx, probe)
            self.surveys[key] = (*measured, time.perf_counter() - start)
        scores, curves, seconds = self.surveys[key]
        # Also if another prune measured it: the timings of prunes then stay comparable.
        self.clock.add("survey", seconds)
        return scores, curves

    def _stored(self, ctx: SelectionContext, probe: int) -> tuple[Scores, Curves | None]:
        """Read the survey from the statistics file, or measure it and write the file."""
        if self.config.statistics is None:
            return self._measure(ctx, probe)
        path = Path(self.config.statistics)
        if not path.is_file():
            statistics_file(path).check_writable()  # before the survey, which takes minutes
        origin = self._origin(ctx, probe)
        if path.exists():
            stored = read_statistics(path, origin)
            self.progress.note(f"statistics are read from {path}; nothing is measured")
            return stored.scores, stored.curves
        scores, curves = self._measure(ctx, probe)
        write_statistics(path, Statistics(scores, curves, origin))
        return scores, curves

    def _measure(self, ctx: SelectionContext, probe: int) -> tuple[Scores, Curves | None]:
        return Survey(
            tower=ctx.tower,
            stages=self.family.stages(ctx.tower),
            groups=ctx.groups,
            criterion=self.criterion,
            pictures=ctx.pictures,
            batch_size=self.config.batch_size,
            ridge=self.config.ridge,
            seed=self.config.seed,
            probe=probe,
            progress=self.progress,
        ).run()

    def _origin(self, ctx: SelectionContext, probe: int) -> dict[str, Any]:
        """Return everything that the survey depends on, as JSON values."""
        return {
            **origin_of(self.backbone, ctx.pictures),
            "groups": min_units_by_group(ctx.groups),
            "criterion": criterion_name(self.config.criterion),
            "ridge": self.config.ridge,
            "seed": self.config.seed,
            "probe": probe,
        }
