"""One row of a comparison: prune by one method at one ratio and seed, then score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ovsprune.backbones import FAMILIES
from ovsprune.baselines.torch_pruning import STOCK, TorchPruning, feature_gradients
from ovsprune.calibration.pictures import open_pictures
from ovsprune.comparison.methods import Method
from ovsprune.comparison.scoring import Scorer
from ovsprune.core.clock import Clock
from ovsprune.core.errors import BudgetError, OptionError
from ovsprune.core.progress import Progress
from ovsprune.core.protocols import Backbone, Budget, Family, Pictures
from ovsprune.core.records import Group, Plan
from ovsprune.graph.costs import count_costs
from ovsprune.graph.groups import find_groups
from ovsprune.pruning.config import PruneConfig
from ovsprune.pruning.pipeline import HELD_OUT, Pipeline, split_seeds
from ovsprune.pruning.planning import Surveys
from ovsprune.pruning.search_space import with_floors

__all__ = ["ComparisonRunner"]


@dataclass(frozen=True)
class _Form:
    """A stock method's tower: of which method, in which form, and with whose gradients."""

    name: str
    rewritten: bool
    seed: int | None


class ComparisonRunner:
    """Makes rows for one dense model; what rows have in common is done once.

    Shared are the dense tower's features, the surveys (rankings and curves) of a criterion and
    seed, and the towers, gradients and tried ratios of a stock method.

    Args:
        backbone: The dense model.
        settings: What holds for every row; ratio, seed and the parts of the method are replaced.
        examiner: Scores the towers.
        progress: Told of every step.
    """

    def __init__(
        self, backbone: Backbone, settings: PruneConfig, examiner: Scorer, progress: Progress
    ) -> None:
        self.backbone, self.settings = backbone, settings.for_model(backbone)
        self.examiner, self.progress = examiner, progress
        self.family: Family = FAMILIES.get(backbone.family)
        self._surveys: Surveys = {}
        self._stock: dict[_Form, TorchPruning] = {}
        self._groups: list[Group] | None = None

    def check(self, methods: Sequence[Method] = ()) -> None:
        """Refuse, before any row is made, what no row could be made with.

        Raises:
            OptionError: A pattern of ``settings.protect`` or of a method's floor matches nothing,
                or the former leave nothing.
        """
        if self.settings.protect:
            self._found()
        for method in methods:
            settings = method.settings(self.settings)
            if settings.floor:
                with_floors(self._found(), settings.floor)

    def row(self, method: Method, ratio: float, seed: int) -> dict[str, Any]:
        """Prune and score; where a method cannot do that to this model, the row says so.

        Returns:
            ``status`` ("done" or "unreachable": the budget is out of reach, or the method needs
            what the model has not), ``reason`` (of an unreachable row, else None),
            ``macs, params, achieved, miou, pixel_accuracy, relative_error`` (None where there is
            no tower), and ``seconds`` of the pruning, a shared survey counted in full.
        """
        clock = Clock()
        settings = method.settings(replace(self.settings, ratio=ratio, seed=seed))
        title = f"{method.name}, ratio {ratio:g}, seed {seed}"
        try:
            with self.progress.stage(f"pruning: {title}", 1) as advance:
                tower = self._prune(method, settings, clock)
                advance(1)
        except (BudgetError, OptionError) as error:
            empty = dict.fromkeys(
                ("macs", "params", "achieved", "miou", "pixel_accuracy", "relative_error")
            )
            return {"status": "unreachable", "reason": str(error), **empty, "seconds": None}
        size = self.backbone.preprocess.size
        dense, slim = count_costs(self.backbone.tower, size), count_costs(tower, size)
        return {
            "status": "done",
            "reason": None,
            "macs": slim.macs,
            "params": slim.params,
            "achieved": 1 - slim.of(settings.budget) / dense.of(settings.budget),
            **self.examiner.examine(tower, title),
            "seconds": round(sum(clock.seconds.values()), 3),
        }

    def _prune(self, method: Method, settings: PruneConfig, clock: Clock) -> nn.Module:
        if method.source != "torch-pruning":
            job = Pipeline(self.backbone, settings, self.progress, clock, self._surveys)
            return job.run().tower
        if method.recovery is not None:
            planner = self._planner(method, settings)
            return (
                Pipeline(self.backbone, settings, self.progress, clock, planner=planner).run().tower
            )
        pictures, _ = open_pictures(
            settings.calibration,
            self.backbone.preprocess,
            settings.pictures,
            HELD_OUT,
            settings.seed,
            self.progress,
        )
        tower = self.backbone.tower
        stock = self._stock_of(method, settings, tower, self._found(), pictures, rewritten=False)
        cut = stock.reach(settings.ratio).tower
        clock.lap("prune")
        return cut

    def _planner(
        self, method: Method, settings: PruneConfig
    ) -> Callable[[nn.Module, list[Group], Budget, Pictures], Plan]:
        """Torch-Pruning's selection on our rewritten tower, as a plan."""

        def plan(dense: nn.Module, groups: list[Group], budget: Budget, pictures: Pictures) -> Plan:
            stock = self._stock_of(method, settings, dense, groups, pictures, rewritten=True)
            return stock.reach(1 - budget.target / budget.dense).plan

        return plan

    def _stock_of(
        self,
        method: Method,
        settings: PruneConfig,
        tower: nn.Module,
        groups: list[Group],
        pictures: Pictures,
        *,
        rewritten: bool,
    ) -> TorchPruning:
        stock = STOCK[method.criterion]
        form = _Form(method.criterion, rewritten, settings.seed if stock.taylor else None)
        if form not in self._stock:
            gradients = {}
            if stock.taylor:
                stages, batch_size = self.family.stages, settings.batch_size
                gradients = feature_gradients(tower, stages, pictures, batch_size, settings.seed)
            size = self.backbone.preprocess.size
            self._stock[form] = TorchPruning(
                form.name,
                stock,
                tower,
                groups,
                size,
                gradients,
                settings.budget,
                settings.round_to,
            )
        return self._stock[form]

    def _found(self) -> list[Group]:
        """What our methods may cut, found on a rewritten copy."""
        if self._groups is None:
            dense = deepcopy(self.backbone.tower).eval().requires_grad_(False)
            self.family.rewrite(dense)
            free, _ = split_seeds(self.family.prunable_layers(dense), self.settings.protect)
            self._groups = find_groups(dense, free, self.backbone.preprocess.size)
        return self._groups
