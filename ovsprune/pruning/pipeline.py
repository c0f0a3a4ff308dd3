"""Steps of a prune on a loaded backbone: search space, selection, cut, recovery, check."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

from torch import Tensor, nn

from ovsprune.allocation.trim import cost
from ovsprune.backbones import FAMILIES
from ovsprune.calibration.batch_norms import recalibrate_batchnorm
from ovsprune.calibration.fidelity import Fidelity, fidelity
from ovsprune.calibration.pictures import open_pictures, unseen_pictures
from ovsprune.core.clock import Clock
from ovsprune.core.errors import BudgetError
from ovsprune.core.progress import Progress
from ovsprune.core.protocols import (
    AllocationContext,
    Backbone,
    Budget,
    Family,
    Pictures,
    RecoveryContext,
)
from ovsprune.core.records import Costs, Group, Plan, Scores
from ovsprune.graph.costs import count_costs
from ovsprune.graph.cut import cut, kept_rows
from ovsprune.graph.groups import with_costs
from ovsprune.profiling.latency import compare_latency, latency_budget
from ovsprune.pruning.config import TOLERANCE, PruneConfig
from ovsprune.pruning.criterion_selector import CriterionSelector
from ovsprune.pruning.provenance import make_spec, provenance
from ovsprune.pruning.reprune import in_base
from ovsprune.pruning.rounds import compose, keep_all, ratios, reindex_groups
from ovsprune.pruning.search_space import SearchSpace
from ovsprune.pruning.selection import Selection, SelectionContext, UnitSelector
from ovsprune.slim import SlimSpec

__all__ = ["HELD_OUT", "Pipeline", "Pruned"]

HELD_OUT = 32
"""Number of images on which the fidelity is measured; they are not used for calibration."""


@dataclass(frozen=True, eq=False)
class Pruned:
    """Result of :meth:`Pipeline.run`; see :class:`ovsprune.jobs.prune.PruneResult`."""

    spec: SlimSpec
    tower: nn.Module
    plan: Plan
    achieved: float
    fidelity: Fidelity
    latency: dict[str, float] | None


@dataclass(frozen=True, eq=False)
class _Cut:
    """Slim tower after the last round, still rewritten."""

    plan: Plan  # in the coordinates of the search space
    tower: nn.Module
    budget: Budget  # of the last round
    cost: float  # by the budget's prices


class Pipeline:
    """Prune of a loaded backbone.

    Args:
        backbone: Model to prune; it is not changed.
        config: Configuration of the prune.
        progress: Progress reporter.
        clock: Receives the seconds of every step.
        selector: Selects the units; by default the criterion and allocation of ``config``.

    Raises:
        OptionError: The configuration is not valid.
        UnknownNameError: A name in the configuration is unknown.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: PruneConfig,
        progress: Progress,
        clock: Clock,
        selector: UnitSelector | None = None,
    ) -> None:
        config = config.for_model(backbone)
        config.check()
        self.backbone, self.config = backbone, config
        self.progress, self.clock = progress, clock
        self.family: Family = FAMILIES.get(backbone.family)
        self.selector = selector or CriterionSelector(backbone, config, progress, clock)
        self.recoveries = config.recoveries
        self.unseen: Pictures | None = None

    def run(self) -> Pruned:
        """Prune the backbone.

        Raises:
            BudgetError: The ratio cannot be reached.
            OptionError: An option does not apply to this model.
            DataError: The calibration images cannot be used.
        """
        size, config = self.backbone.preprocess.size, self.config
        dense = self._copy()
        # Rewriting changes the counts slightly, so the costs are those of the original tower.
        base = count_costs(dense, size)
        space = SearchSpace.build(
            self.backbone,
            dense,
            protect=config.protect,
            floor=config.floor,
            uniform_heads=config.uniform_heads,
            prune_depth=config.prune_depth,
        )
        self.clock.lap("graph")
        pictures, held_out = self._open_pictures()
        result = self._prune_in_rounds(space, base, pictures)
        slim, plan = result.tower, result.plan
        self.family.finish(slim, space.groups, plan)  # undoes the rewriting
        if config.repairs:
            # The rewritten dense tower has its norms folded: a fresh copy still has them.
            recalibrate_batchnorm(
                self._copy(),
                slim,
                kept_rows(dense, space.groups, plan),
                self.family.stages,
                pictures,
                config.batch_size,
                self.progress,
            )
        costs = count_costs(slim, size)
        achieved = self._achieved(base, costs, result)
        agreement = fidelity(
            self._dense_features(dense),
            self._dense_features(slim),
            held_out,
            config.batch_size,
            next(self.backbone.tower.parameters()).device,
        )
        latency = self._latency(slim, result)
        self.clock.lap("check")
        spec = make_spec(
            self.backbone, space, plan, (base, costs), provenance(self.config, pictures)
        )
        return Pruned(
            spec=spec,
            tower=slim,
            plan=in_base(self.backbone.slim, plan),
            achieved=achieved,
            fidelity=agreement,
            latency=latency,
        )

    def _copy(self) -> nn.Module:
        """Return a float32 copy of the tower; moments and recoveries need that precision."""
        return deepcopy(self.backbone.tower).float().eval().requires_grad_(False)

    def _open_pictures(self) -> tuple[Pictures, Pictures]:
        """Return calibration images and held-out images; open the validation images of training."""
        config = self.config
        source = (config.calibration, self.backbone.preprocess, config.pictures, HELD_OUT)
        pictures, held_out = open_pictures(*source, config.seed, self.progress)
        if config.trains:
            self.unseen = unseen_pictures(*source, config.seed, HELD_OUT)
            if self.unseen is None:
                self.progress.note(
                    f"{config.calibration} has no images left to validate the training on: an "
                    "eighth of the calibration images is used, which the refits have seen. "
                    f"{config.pictures + 2 * HELD_OUT} images are enough, or fewer --samples"
                )
        return pictures, held_out

    def _dense_features(self, tower: nn.Module) -> Callable[[Tensor], Tensor]:
        stages = self.family.stages(tower)
        return lambda images: stages.outputs(images)[1]

    def _prune_in_rounds(self, space: SearchSpace, base: Costs, pictures: Pictures) -> _Cut:
        """Select, cut and repair, once or in rounds.

        The dense tower is the reference of the repair in every round.
        """
        dense, groups = space.tower, space.groups
        # The tower to be cut is copied after the survey, which then has one copy less in memory.
        slim: nn.Module | None = None
        plan = keep_all(groups)
        steps = ratios(self.config.ratio, self.config.rounds)
        with self.progress.stage("pruning", len(steps)) as advance:
            for number, ratio in enumerate(steps, 1):
                # Selection works in the coordinates of the present tower, the plan in dense ones.
                ctx = self._context(space, slim, plan, base, ratio, pictures)
                selection = self._select(ctx, number, len(steps))
                if slim is None:
                    slim = selection.trained or deepcopy(dense)
                cut(slim, ctx.groups, selection.plan)
                plan = compose(plan, selection.plan)
                self._recover(dense, slim, groups, plan, pictures)
                self.clock.lap("recover")
                advance(1)
        assert slim is not None
        widths = {g.name: selection.plan.width(g.name) for g in ctx.groups}
        remaining = cost(
            AllocationContext(
                groups=ctx.groups, scores=Scores({}, {}), budget=ctx.budget, curves=None
            ),
            widths,
        )
        return _Cut(plan=plan, tower=slim, budget=ctx.budget, cost=remaining)

    def _context(
        self,
        space: SearchSpace,
        slim: nn.Module | None,
        plan: Plan,
        base: Costs,
        ratio: float,
        pictures: Pictures,
    ) -> SelectionContext:
        """Return tower, groups and budget of the next round; ``slim`` is None in the first one."""
        size = self.backbone.preprocess.size
        tower = space.tower if slim is None else slim
        groups = reindex_groups(space.groups, plan)
        current = base
        if slim is not None:
            # The cost of a unit can depend on the widths of other groups, and these were cut.
            groups = with_costs(slim, groups, size)
            current = self._current_costs(base, space.tower, slim)
        kind = self.config.budget
        if kind == "latency":
            table = self.config.latency_table
            budget = latency_budget(tower, groups, self.family, size, ratio, table, self.progress)
            self.clock.lap("layer times")
        else:
            # The ratio refers to the dense tower, also in later rounds.
            budget = Budget(kind, float(current.of(kind)), base.of(kind) * (1 - ratio))
        return SelectionContext(
            tower=tower, groups=groups, budget=budget, pictures=pictures, is_dense=slim is None
        )

    def _select(self, ctx: SelectionContext, number: int, rounds: int) -> Selection:
        try:
            return self.selector.select(ctx)
        except BudgetError as error:
            if rounds == 1:
                raise
            raise BudgetError(
                f"round {number} of {rounds}, as fractions of the cost at its start: {error}"
            ) from error

    def _current_costs(self, base: Costs, dense: nn.Module, slim: nn.Module) -> Costs:
        """Return the costs of the cut tower in its original form.

        The rewritten towers are counted, and their difference is subtracted from the base.
        """
        size = self.backbone.preprocess.size
        before, after = count_costs(dense, size), count_costs(slim, size)
        return Costs(
            base.macs - before.macs + after.macs, base.params - before.params + after.params
        )

    def _recover(
        self,
        dense: nn.Module,
        slim: nn.Module,
        groups: list[Group],
        plan: Plan,
        pictures: Pictures,
    ) -> None:
        ctx = RecoveryContext(
            dense=dense,
            slim=slim,
            stages=self.family.stages,
            groups=groups,
            plan=plan,
            pictures=pictures,
            batch_size=self.config.batch_size,
            ridge=self.config.ridge,
            seed=self.config.seed,
            progress=self.progress,
            # The limits of the training hold for all rounds together.
            distill=self.config.distill.shared(self.config.rounds),
            unseen=self.unseen,
        )
        for recovery in self.recoveries:
            recovery.recover(ctx)

    def _achieved(self, base: Costs, slim: Costs, result: _Cut) -> float:
        """Return the removed fraction of the cost: counted, or predicted for a latency.

        Raises:
            BudgetError: It differs from the requested ratio by more than the tolerance.
        """
        achieved = {
            "macs": 1 - slim.macs / base.macs,
            "params": 1 - slim.params / base.params,
            "latency": 1 - result.cost / result.budget.dense,
        }[self.config.budget]
        if abs(achieved - self.config.ratio) > TOLERANCE:
            heads = ", --uniform-heads" if self.config.uniform_heads else ""
            raise BudgetError(
                f"a ratio of {self.config.ratio:.3f} of the {self.config.budget} cannot be met "
                f"within {TOLERANCE}: the nearest is {achieved:.3f} with --round-to "
                f"{self.config.round_to}{heads}"
            )
        return achieved

    def _latency(self, slim: nn.Module, result: _Cut) -> dict[str, float] | None:
        """Return measured and predicted latency; None unless the budget is a latency."""
        if self.config.budget != "latency":
            return None
        dense = deepcopy(self.backbone.tower).float()  # float32 as the slim tower
        measured = compare_latency(dense, slim, self.backbone.preprocess.size, self.progress)
        return {**measured, "predicted_ms": result.cost}
