"""The steps of a prune, on a loaded backbone: group, rank, allocate, cut, recover, check."""

from __future__ import annotations

import time
from collections.abc import Callable, MutableMapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ovsprune.allocation.tied import tied_widths
from ovsprune.allocation.trim import cost
from ovsprune.backbones import FAMILIES
from ovsprune.calibration.fidelity import Fidelity, fidelity
from ovsprune.calibration.pictures import calibration_hash, open_pictures
from ovsprune.calibration.survey import Survey
from ovsprune.core.errors import BudgetError, OptionError
from ovsprune.core.progress import Progress
from ovsprune.core.protocols import (
    AllocationContext,
    Backbone,
    Budget,
    Family,
    Pictures,
    RecoveryContext,
    Seed,
)
from ovsprune.core.records import Costs, Curves, Group, Plan, Scores
from ovsprune.graph.costs import measure
from ovsprune.graph.cut import cut
from ovsprune.graph.groups import find_groups
from ovsprune.importance import criterion_name
from ovsprune.jobs.floors import with_floors
from ovsprune.jobs.latency import compare_latency, latency_budget
from ovsprune.jobs.settings import TOLERANCE, Settings
from ovsprune.slim import SlimSpec
from ovsprune.slim.hashing import base_spec
from ovsprune.slim.spec import LayerSpec, SliceSpec
from ovsprune.spectrum import group_alphas

__all__ = ["Clock", "Job", "Planner", "Pruned", "Surveys"]

HELD_OUT = 32
"""Pictures that calibration never sees, on which the fidelity is measured."""


@dataclass(frozen=True, eq=False)
class Pruned:
    """What a job gave; see :class:`ovsprune.jobs.prune.PruneResult`."""

    spec: SlimSpec
    tower: nn.Module
    plan: Plan
    achieved: float
    fidelity: Fidelity
    latency: dict[str, float] | None = None


class Clock:
    """Seconds by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, step: str) -> None:
        now = time.perf_counter()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self._last
        self._last = now

    def add(self, step: str, seconds: float) -> None:
        """Count ``seconds``, whoever spent them, and start the next lap now."""
        self.seconds[step] = self.seconds.get(step, 0.0) + seconds
        self._last = time.perf_counter()


Surveys = MutableMapping[Any, tuple[Scores, Curves | None, float]]
"""What surveys of one backbone found, and their seconds: shared by jobs that differ in ratio,
allocation or recovery."""

Planner = Callable[[nn.Module, list[Group], Budget, Pictures], Plan]
"""Chooses the units in place of criterion and allocation: (dense, groups, budget, pictures)."""


class Job:
    """One prune of one loaded backbone.

    Args:
        backbone: What is pruned; it is not changed.
        settings: What decides the prune.
        progress: Is told how the work goes.
        clock: Keeps the seconds; a survey that is shared counts in full for each job.
        surveys: Surveys that are there already; new ones are added.
        planner: Chooses the units instead of the settings' criterion and allocation.
    """

    def __init__(
        self,
        backbone: Backbone,
        settings: Settings,
        progress: Progress,
        clock: Clock,
        surveys: Surveys | None = None,
        planner: Planner | None = None,
    ) -> None:
        self.backbone, self.settings, self.progress = backbone, settings, progress
        self.clock = clock
        self.surveys: Surveys = {} if surveys is None else surveys
        self.planner: Planner = planner or self._plan
        self.family: Family = FAMILIES.get(backbone.family)
        self.criterion, self.allocator, self.recovery = settings.check()
        self.device = next(backbone.tower.parameters()).device
        self._spent = 0.0  # What the allocator's own model says that the plan costs.

    def run(self) -> Pruned:
        size = self.backbone.preprocess.size
        dense = deepcopy(self.backbone.tower).eval().requires_grad_(False)
        base = measure(dense, size)
        self.family.rewrite(dense)
        seeds = self.family.seeds(dense)
        free, protected = _split(seeds, self.settings.protect)
        groups = with_floors(find_groups(dense, free, size), self.settings.floor)
        self.clock.lap("graph")
        budget = self._budget(base, dense, groups)
        pictures, held_out = open_pictures(
            self.settings.calibration,
            self.backbone.preprocess,
            self.settings.samples,
            HELD_OUT,
            self.settings.seed,
            self.progress,
        )
        plan = self.planner(dense, groups, budget, pictures)
        slim = deepcopy(dense)
        cut(slim, groups, plan)
        if self.recovery.needs_pictures:
            self._recover(dense, slim, groups, plan, pictures)
        self.clock.lap("recover")
        self.family.finish(slim, groups, plan)
        costs = measure(slim, size)
        achieved = self._achieved(budget, costs)
        closeness = fidelity(
            self._features(dense),
            self._features(slim),
            held_out,
            self.settings.batch_size,
            self.device,
        )
        latency = self._latency(slim, budget)
        self.clock.lap("check")
        spec = self._spec(groups, seeds, protected, plan, base, costs, pictures)
        return Pruned(spec, slim, plan, achieved, closeness, latency)

    def _features(self, tower: nn.Module) -> Callable[[Tensor], Tensor]:
        stages = self.family.stages(tower)

        def dense(images: Tensor) -> Tensor:
            stream = stages.stem(images)
            for block in stages.blocks.values():
                stream = block(stream)
            return stages.head(stream)[1]

        return dense

    def _budget(self, base: Costs, dense: nn.Module, groups: list[Group]) -> Budget:
        settings = self.settings
        if settings.budget == "latency":
            size, file = self.backbone.preprocess.size, settings.latency_table
            budget = latency_budget(
                dense, groups, self.family, size, settings.ratio, file, self.progress
            )
            self.clock.lap("layer times")
            return budget
        whole = float(base.macs if settings.budget == "macs" else base.params)
        return Budget(settings.budget, whole, whole * (1 - settings.ratio))

    def _latency(self, slim: nn.Module, budget: Budget) -> dict[str, float] | None:
        """What the slim tower really takes, beside what the table said."""
        if budget.kind != "latency":
            return None
        found = compare_latency(
            self.backbone.tower, slim, self.backbone.preprocess.size, self.progress
        )
        return {**found, "predicted_ms": self._spent}

    def _plan(
        self, dense: nn.Module, groups: list[Group], budget: Budget, pictures: Pictures
    ) -> Plan:
        scores, curves = self._survey(dense, groups, pictures)
        item = AllocationContext(
            groups,
            scores,
            budget,
            curves,
            self.settings.round_to,
            spectra=group_alphas(dense, groups, self.progress)
            if self.allocator.needs_spectra
            else None,
            comparable=getattr(self.criterion, "comparable", False),
        )
        tied = self.settings.uniform_heads
        widths = tied_widths(self.allocator, item) if tied else self.allocator.widths(item)
        self._spent = cost(item, widths)
        kept = {
            g.name: scores.orders[g.name][g.units - widths[g.name] :].sort().values for g in groups
        }
        self.clock.lap("allocate")
        return Plan(kept)

    def _survey(
        self, dense: nn.Module, groups: list[Group], pictures: Pictures
    ) -> tuple[Scores, Curves | None]:
        """Rankings and curves, which depend neither on the ratio nor on the recovery."""
        probe = self.settings.probe_pictures if self.allocator.needs_curves else 0
        key = (replace(self.settings, ratio=0.5, budget="", allocation="", recovery=""), probe)
        if key not in self.surveys:
            start = time.perf_counter()
            found = Survey(
                dense,
                self.family.stages(dense),
                groups,
                self.criterion,
                pictures,
                batch_size=self.settings.batch_size,
                ridge=self.settings.ridge,
                seed=self.settings.seed,
                probe=probe,
                progress=self.progress,
            ).run()
            self.surveys[key] = (*found, time.perf_counter() - start)
        scores, curves, seconds = self.surveys[key]
        self.clock.add("survey", seconds)
        return scores, curves

    def _recover(
        self,
        dense: nn.Module,
        slim: nn.Module,
        groups: list[Group],
        plan: Plan,
        pictures: Pictures,
    ) -> None:
        self.recovery.recover(
            RecoveryContext(
                dense,
                slim,
                self.family.stages,
                groups,
                plan,
                pictures,
                self.settings.batch_size,
                self.settings.ridge,
                self.settings.seed,
                self.progress,
            )
        )

    def _achieved(self, budget: Budget, slim: Costs) -> float:
        """Share of the budget's cost that is gone: counted, or for a latency, predicted."""
        left = {"macs": slim.macs, "params": slim.params, "latency": self._spent}[budget.kind]
        achieved = 1 - left / budget.dense
        if abs(achieved - self.settings.ratio) > TOLERANCE:
            heads = ", --uniform-heads" if self.settings.uniform_heads else ""
            raise BudgetError(
                f"a ratio of {self.settings.ratio:.3f} of the {self.settings.budget} cannot be met "
                f"within {TOLERANCE}: the nearest is {achieved:.3f} with --round-to "
                f"{self.settings.round_to}{heads}"
            )
        return achieved

    def _spec(
        self,
        groups: list[Group],
        seeds: list[Seed],
        protected: dict[str, str],
        plan: Plan,
        base: Costs,
        slim: Costs,
        pictures: Pictures,
    ) -> SlimSpec:
        backbone, settings = self.backbone, self.settings
        return SlimSpec(
            base=base_spec(
                backbone.name, backbone.pretrained, backbone.trained, backbone.tower.state_dict()
            ),
            family=backbone.family,
            library=self.family.library,
            library_version=backbone.library_version,
            architecture=backbone.architecture,
            activation=backbone.activation,
            preprocess=backbone.preprocess,
            layers=tuple(_layer(g, plan) for g in groups),
            protected=tuple(protected),
            dense=base,
            slim=slim,
            provenance={
                "criterion": criterion_name(settings.criterion),
                "allocation": settings.allocation,
                "recovery": settings.recovery,
                "budget": settings.budget,
                "ratio": settings.ratio,
                "calibration": settings.calibration
                if settings.calibration == "procedural"
                else "folder",
                "calibration_hash": calibration_hash(pictures),
                "samples": len(pictures),
                "round_to": settings.round_to,
                "floor": list(settings.floor),
                "uniform_heads": settings.uniform_heads,
                "ridge": settings.ridge,
                "seed": settings.seed,
                "torch": torch.__version__,
            },
        )


def _layer(group: Group, plan: Plan) -> LayerSpec:
    slices: tuple[SliceSpec, ...] = ()
    if group.kind != "heads":
        for part in group.slices:
            offset = int(part.rows[0, 0])
            if not torch.equal(part.rows.flatten(), torch.arange(part.rows.numel()) + offset):
                raise AssertionError(f"{part.module}: the format has no units that are scattered")
            slices += (SliceSpec(part.module, part.axis, offset),)
    return LayerSpec(
        name=group.name,
        kind=group.kind,
        block=group.block,
        units=group.units,
        kept=plan.width(group.name),
        unit_width=int(group.columns.shape[1]),
        slices=slices,
    )


def _split(seeds: Sequence[Seed], patterns: Sequence[str]) -> tuple[list[Seed], dict[str, str]]:
    """Seeds that may be cut, and the names of the others with the reason.

    Raises:
        OptionError: A pattern matches nothing, or everything is protected.
    """
    protected = {s.name: s.protected for s in seeds if s.protected}
    for pattern in patterns:
        hits = [s.name for s in seeds if _matches(s, pattern)]
        if not hits:
            raise OptionError(
                f"--protect {pattern!r} matches no group; groups are named like "
                f"{', '.join(s.name for s in seeds[:2])}, and * stands for anything"
            )
        protected |= dict.fromkeys(hits, f"--protect {pattern}")
    free = [s for s in seeds if s.name not in protected]
    if not free:
        raise OptionError("everything is protected; there is nothing to cut")
    return free, protected


def _matches(seed: Seed, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in (seed.name, seed.block, seed.layer))
