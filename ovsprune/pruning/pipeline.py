"""The steps of a prune, on a loaded backbone: group, plan, cut and recover, check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import Tensor, nn

from ovsprune.backbones import FAMILIES
from ovsprune.baselines.imp_checkpoint import RoundsFile
from ovsprune.baselines.imp_units import prune_units
from ovsprune.calibration.batch_norms import recalibrate_batchnorm
from ovsprune.calibration.fidelity import Fidelity, fidelity
from ovsprune.calibration.pictures import open_pictures, unseen_pictures
from ovsprune.core.clock import Clock
from ovsprune.core.errors import BudgetError, OptionError
from ovsprune.core.progress import Progress
from ovsprune.core.protocols import Backbone, Family, Pictures, PrunableLayer, RecoveryContext
from ovsprune.core.records import Costs, Group, Plan
from ovsprune.graph.costs import count_costs
from ovsprune.graph.cut import cut, kept_rows
from ovsprune.graph.groups import find_groups, with_costs
from ovsprune.profiling.latency import compare_latency
from ovsprune.pruning.config import TOLERANCE, PruneConfig
from ovsprune.pruning.planning import Planner, Planning, Surveys
from ovsprune.pruning.provenance import make_spec, provenance
from ovsprune.pruning.reprune import in_base, marked
from ovsprune.pruning.rounds import compose, keep_all, ratios, reindex_groups
from ovsprune.pruning.search_space import with_floors, without_floors
from ovsprune.slim import SlimSpec

__all__ = ["HELD_OUT", "Pipeline", "Pruned", "split_seeds"]

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
    latency: dict[str, float] | None


class Pipeline:
    """One prune of one loaded backbone.

    Args:
        backbone: What is pruned; it is not changed.
        settings: What decides the prune.
        progress: Is told how the work goes.
        clock: Keeps the seconds.
        surveys: Surveys that are there already; new ones are added.
        planner: Chooses the units instead of the settings' criterion and allocation.
    """

    def __init__(
        self,
        backbone: Backbone,
        settings: PruneConfig,
        progress: Progress,
        clock: Clock,
        surveys: Surveys | None = None,
        planner: Planner | None = None,
    ) -> None:
        settings = settings.for_model(backbone)
        self.backbone, self.settings, self.progress = backbone, settings, progress
        self.clock = clock
        self.family: Family = FAMILIES.get(backbone.family)
        self.planning = Planning(
            backbone, self.family, settings, progress, clock, {} if surveys is None else surveys
        )
        self.planner: Planner = planner or self.planning.plan
        self.recoveries = settings.recoveries
        self.unseen: Pictures | None = None
        self.device = next(backbone.tower.parameters()).device

    def run(self) -> Pruned:
        """The whole of it."""
        size = self.backbone.preprocess.size
        # Half precision is for files: second moments and repairs need float32.
        dense = deepcopy(self.backbone.tower).float().eval().requires_grad_(False)
        base = count_costs(dense, size)
        self.family.rewrite(dense)
        seeds = self.family.prunable_layers(dense)
        if self.settings.uniform_heads:
            seeds = self._all_heads(seeds)
        free, protected = split_seeds(seeds, self.settings.protect)
        groups = marked(self.backbone.slim, find_groups(dense, free, size))
        if self.settings.prune_depth:
            groups = without_floors(dense, groups)
        groups = with_floors(groups, self.settings.floor)
        self.clock.lap("graph")
        pictures, held_out = open_pictures(
            self.settings.calibration,
            self.backbone.preprocess,
            self.settings.pictures,
            HELD_OUT,
            self.settings.seed,
            self.progress,
        )
        if any(recovery.trains for recovery in self.recoveries):
            self.unseen = unseen_pictures(
                self.settings.calibration,
                self.backbone.preprocess,
                self.settings.pictures,
                HELD_OUT,
                self.settings.seed,
                HELD_OUT,
            )
            if self.unseen is None:
                self.progress.note(
                    f"{self.settings.calibration} has no pictures left to judge the training by: "
                    "an eighth of calibration's serve, which the refits have seen. "
                    f"{self.settings.pictures + 2 * HELD_OUT} pictures are enough, or fewer "
                    "--samples"
                )
        work = self._trained if self.settings.method == "imp" else self._rounds
        plan, slim, predicted = work(dense, groups, base, pictures)
        self.family.finish(slim, groups, plan)
        if self.settings.repairs:
            recalibrate_batchnorm(
                deepcopy(self.backbone.tower).float().eval(),  # the dense one has its norms folded
                slim,
                kept_rows(dense, groups, plan),
                self.family.stages,
                pictures,
                self.settings.batch_size,
                self.progress,
            )
        costs = count_costs(slim, size)
        achieved = self._achieved(base, costs, predicted)
        closeness = fidelity(
            self._features(dense),
            self._features(slim),
            held_out,
            self.settings.batch_size,
            self.device,
        )
        latency = self._latency(slim)
        self.clock.lap("check")
        spec = make_spec(
            self.backbone,
            self.family,
            groups,
            plan,
            protected,
            (base, costs),
            provenance(self.settings, pictures),
            seeds,
        )
        plan = in_base(self.backbone.slim, plan)
        return Pruned(spec, slim, plan, achieved, closeness, latency)

    def _all_heads(self, seeds: Sequence[PrunableLayer]) -> list[PrunableLayer]:
        """The seeds, with the heads of every block offered: those of the last one count, too."""
        if not any(seed.kind == "heads" for seed in seeds):
            raise OptionError(
                f"--uniform-heads: {self.backbone.name} has no heads to be cut; leave it out"
            )
        return [replace(s, protected=None) if s.kind == "heads" else s for s in seeds]

    def _features(self, tower: nn.Module) -> Callable[[Tensor], Tensor]:
        stages = self.family.stages(tower)
        return lambda images: stages.outputs(images)[1]

    def _rounds(
        self, dense: nn.Module, groups: list[Group], base: Costs, pictures: Pictures
    ) -> tuple[Plan, nn.Module, float]:
        """Plan, cut and repair, once or in rounds; the teacher is the dense tower every time.

        Returns:
            The plan in dense coordinates, the slim tower, and the share of the budget's cost that
            the last round took by the budget's own prices.
        """
        # The copy that is cut is made after the survey: two whole towers, and not three, beside it.
        slim: nn.Module | None = None
        plan = keep_all(groups)
        steps = ratios(self.settings.ratio, self.settings.rounds)
        taken = 0.0
        with self.progress.stage("pruning", len(steps)) as advance:
            for number, ratio in enumerate(steps, 1):
                # A planner may keep the tower that it is given: the dense one is never changed.
                tower, found, now = dense, reindex_groups(groups, plan), base
                if slim is not None:
                    tower = slim
                    self.planning.dense_no_more()
                    found = with_costs(slim, found, self.backbone.preprocess.size)
                    now = self._left(base, dense, slim)
                budget = self.planning.budget(tower, found, base, now, ratio)
                try:
                    chosen = self.planner(tower, found, budget, pictures)
                except BudgetError as error:
                    if len(steps) == 1:
                        raise
                    raise BudgetError(
                        f"round {number} of {len(steps)}, in shares of what is left by then: "
                        f"{error}"
                    ) from error
                taken = self.planning.account(found, budget, chosen)
                if slim is None:
                    slim = deepcopy(dense)
                cut(slim, found, chosen)
                plan = compose(plan, chosen)
                self._recover(dense, slim, groups, plan, pictures)
                self.clock.lap("recover")
                advance(1)
        assert slim is not None
        return plan, slim, taken

    def _trained(
        self, dense: nn.Module, groups: list[Group], base: Costs, pictures: Pictures
    ) -> tuple[Plan, nn.Module, float]:
        """Iterative magnitude pruning of units; the same results as of :meth:`_rounds`."""
        budget = self.planning.budget(dense, groups, base, base, self.settings.ratio)
        ranked = {
            "groups": {g.name: [g.units, g.min_units] for g in groups},
            "budget": budget.kind,
            "target": budget.target,
        }
        rounds = RoundsFile(self.settings, self.backbone, pictures, ranked, self.progress)
        plan, slim = prune_units(
            dense,
            groups,
            budget,
            pictures,
            self.family.stages,
            self.settings,
            rounds,
            self.progress,
        )
        taken = self.planning.account(groups, budget, plan)
        cut(slim, groups, plan)
        self.clock.lap("imp")
        return plan, slim, taken

    def _left(self, base: Costs, dense: nn.Module, slim: nn.Module) -> Costs:
        """Costs of the cut tower: those of the base less what the cuts took."""
        size = self.backbone.preprocess.size
        before, now = count_costs(dense, size), count_costs(slim, size)
        return Costs(base.macs - before.macs + now.macs, base.params - before.params + now.params)

    def _recover(
        self,
        dense: nn.Module,
        slim: nn.Module,
        groups: list[Group],
        plan: Plan,
        pictures: Pictures,
    ) -> None:
        ctx = RecoveryContext(
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
            self.unseen,
        )
        for recovery in self.recoveries:
            recovery.recover(ctx)

    def _achieved(self, base: Costs, slim: Costs, predicted: float) -> float:
        """Share of the budget's cost that is gone: counted, or for a latency, predicted."""
        achieved = {
            "macs": 1 - slim.macs / base.macs,
            "params": 1 - slim.params / base.params,
            "latency": predicted,
        }[self.settings.budget]
        if abs(achieved - self.settings.ratio) > TOLERANCE:
            heads = ", --uniform-heads" if self.settings.uniform_heads else ""
            raise BudgetError(
                f"a ratio of {self.settings.ratio:.3f} of the {self.settings.budget} cannot be met "
                f"within {TOLERANCE}: the nearest is {achieved:.3f} with --round-to "
                f"{self.settings.round_to}{heads}"
            )
        return achieved

    def _latency(self, slim: nn.Module) -> dict[str, float] | None:
        """What the slim tower really takes, beside what the table said."""
        if self.settings.budget != "latency":
            return None
        dense = deepcopy(self.backbone.tower).float()
        found = compare_latency(dense, slim, self.backbone.preprocess.size, self.progress)
        return {**found, "predicted_ms": self.planning.spent}


def split_seeds(
    seeds: Sequence[PrunableLayer], patterns: Sequence[str]
) -> tuple[list[PrunableLayer], dict[str, str]]:
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


def _matches(seed: PrunableLayer, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in (seed.name, seed.block, seed.layer))
