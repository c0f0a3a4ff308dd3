"""The steps of a prune, on a loaded backbone: group, rank, allocate, cut, recover, check."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

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
from ovsprune.core.records import Costs, Group, Plan
from ovsprune.graph.costs import measure
from ovsprune.graph.cut import cut
from ovsprune.graph.groups import find_groups, with_costs
from ovsprune.jobs.rounds import compose, everything, narrow, ratios
from ovsprune.jobs.settings import TOLERANCE, Settings, recovery_chain
from ovsprune.slim import SlimSpec
from ovsprune.slim.hashing import base_spec
from ovsprune.slim.spec import LayerSpec, SliceSpec

__all__ = ["Clock", "Job", "Pruned"]

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


class Clock:
    """Seconds by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, step: str) -> None:
        now = time.perf_counter()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self._last
        self._last = now


class Job:
    """One prune of one loaded backbone."""

    def __init__(
        self,
        backbone: Backbone,
        settings: Settings,
        progress: Progress,
        clock: Clock,
    ) -> None:
        self.backbone, self.settings, self.progress = backbone, settings, progress
        self.clock = clock
        self.family: Family = FAMILIES.get(backbone.family)
        self.criterion, self.allocator, _ = settings.check()
        self.recoveries = recovery_chain(settings.recovery)
        self.device = next(backbone.tower.parameters()).device

    def run(self) -> Pruned:
        size = self.backbone.preprocess.size
        # Half precision is for files: second moments and repairs need float32.
        dense = deepcopy(self.backbone.tower).float().eval().requires_grad_(False)
        base = measure(dense, size)
        self.family.rewrite(dense)
        seeds = self.family.seeds(dense)
        free, protected = _split(seeds, self.settings.protect)
        groups = find_groups(dense, free, size)
        self.clock.lap("graph")
        pictures, held_out = open_pictures(
            self.settings.calibration,
            self.backbone.preprocess,
            self.settings.samples,
            HELD_OUT,
            self.settings.seed,
            self.progress,
        )
        plan, slim = self._rounds(dense, groups, base, pictures)
        self.family.finish(slim, groups, plan)
        costs = measure(slim, size)
        achieved = self._achieved(base, costs)
        closeness = fidelity(
            self._features(dense),
            self._features(slim),
            held_out,
            self.settings.batch_size,
            self.device,
        )
        self.clock.lap("check")
        spec = self._spec(groups, seeds, protected, plan, base, costs, pictures)
        return Pruned(spec, slim, plan, achieved, closeness)

    def _features(self, tower: nn.Module) -> Callable[[Tensor], Tensor]:
        stages = self.family.stages(tower)

        def dense(images: Tensor) -> Tensor:
            stream = stages.stem(images)
            for block in stages.blocks.values():
                stream = block(stream)
            return stages.head(stream)[1]

        return dense

    def _rounds(
        self, dense: nn.Module, groups: list[Group], base: Costs, pictures: Pictures
    ) -> tuple[Plan, nn.Module]:
        """Plan, cut and repair, once or in rounds; the teacher is the dense tower every time."""
        slim, plan = deepcopy(dense), everything(groups)
        steps = ratios(self.settings.ratio, self.settings.rounds)
        with self.progress.stage("pruning", len(steps)) as advance:
            for number, ratio in enumerate(steps, 1):
                found = narrow(groups, plan)
                spent = base
                if number > 1:
                    found = with_costs(slim, found, self.backbone.preprocess.size)
                    spent = self._left(base, dense, slim)
                try:
                    chosen = self._plan(slim, found, self._budget(base, spent, ratio), pictures)
                except BudgetError as error:
                    if len(steps) == 1:
                        raise
                    raise BudgetError(
                        f"round {number} of {len(steps)}, in shares of what is left by then: "
                        f"{error}"
                    ) from error
                cut(slim, found, chosen)
                plan = compose(plan, chosen)
                self._recover(dense, slim, groups, plan, pictures)
                self.clock.lap("recover")
                advance(1)
        return plan, slim

    def _left(self, base: Costs, dense: nn.Module, slim: nn.Module) -> Costs:
        """Costs of the cut tower: those of the base less what the cuts took."""
        size = self.backbone.preprocess.size
        before, now = measure(dense, size), measure(slim, size)
        return Costs(base.macs - before.macs + now.macs, base.params - before.params + now.params)

    def _budget(self, base: Costs, spent: Costs, ratio: float) -> Budget:
        kind = self.settings.budget
        whole, now = (base.macs, spent.macs) if kind == "macs" else (base.params, spent.params)
        return Budget(kind, float(now), whole * (1 - ratio))

    def _plan(
        self, tower: nn.Module, groups: list[Group], budget: Budget, pictures: Pictures
    ) -> Plan:
        scores, curves = Survey(
            tower,
            self.family.stages(tower),
            groups,
            self.criterion,
            pictures,
            batch_size=self.settings.batch_size,
            ridge=self.settings.ridge,
            seed=self.settings.seed,
            probe=self.settings.probe_pictures if self.allocator.needs_curves else 0,
            progress=self.progress,
        ).run()
        self.clock.lap("survey")
        item = AllocationContext(groups, scores, budget, curves, self.settings.round_to)
        widths = self.allocator.widths(item)
        kept = {
            g.name: scores.orders[g.name][g.units - widths[g.name] :].sort().values for g in groups
        }
        self.clock.lap("allocate")
        return Plan(kept)

    def _recover(
        self,
        dense: nn.Module,
        slim: nn.Module,
        groups: list[Group],
        plan: Plan,
        pictures: Pictures,
    ) -> None:
        item = RecoveryContext(
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
            self.settings.distill.shared(self.settings.rounds),
        )
        for recovery in self.recoveries:
            recovery.recover(item)

    def _achieved(self, base: Costs, slim: Costs) -> float:
        pair = (
            (base.macs, slim.macs) if self.settings.budget == "macs" else (base.params, slim.params)
        )
        achieved = 1 - pair[1] / pair[0]
        if abs(achieved - self.settings.ratio) > TOLERANCE:
            raise BudgetError(
                f"a ratio of {self.settings.ratio:.3f} of the {self.settings.budget} cannot be met "
                f"within {TOLERANCE}: the nearest is {achieved:.3f} with --round-to "
                f"{self.settings.round_to}"
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
                "criterion": settings.criterion,
                "allocation": settings.allocation,
                "recovery": settings.recovery,
                "rounds": settings.rounds,
                "budget": settings.budget,
                "ratio": settings.ratio,
                "calibration": settings.calibration
                if settings.calibration == "procedural"
                else "folder",
                "calibration_hash": calibration_hash(pictures),
                "samples": len(pictures),
                "round_to": settings.round_to,
                "ridge": settings.ridge,
                "seed": settings.seed,
                "torch": torch.__version__,
                **self._training(),
            },
        )

    def _training(self) -> dict[str, Any]:
        """How the recoveries trained; empty where none takes a gradient step."""
        trained = any(recovery.trains for recovery in self.recoveries)
        return {"distill": asdict(self.settings.distill)} if trained else {}


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
