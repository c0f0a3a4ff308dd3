"""Rows of a comparison: prune by one method at one ratio and seed, then score."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

from torch import nn

from ovsprune.baselines.imp_units import imp_selector
from ovsprune.baselines.torch_pruning_selector import TorchPruningRuns, TorchPruningSelector
from ovsprune.calibration.pictures import open_pictures
from ovsprune.comparison.methods import Method
from ovsprune.comparison.scoring import Scorer
from ovsprune.core.clock import Clock
from ovsprune.core.errors import BudgetError, OptionError
from ovsprune.core.progress import Progress
from ovsprune.core.protocols import Backbone
from ovsprune.core.records import Group
from ovsprune.graph.costs import count_costs
from ovsprune.pruning.config import PruneConfig
from ovsprune.pruning.criterion_selector import CriterionSelector, Surveys
from ovsprune.pruning.pipeline import HELD_OUT, Pipeline
from ovsprune.pruning.search_space import SearchSpace, raise_min_units
from ovsprune.pruning.selection import UnitSelector

__all__ = ["ComparisonRunner"]


class ComparisonRunner:
    """Makes the rows of a comparison for one dense model.

    Rows share the dense tower's features, the surveys (rankings and error curves) of a criterion
    and seed, and the runs of Torch-Pruning.

    Args:
        backbone: Dense model.
        config: Options that hold for every row; ratio, seed and the method's options are replaced.
        scorer: Scores the towers.
        progress: Progress reporter.
    """

    def __init__(
        self, backbone: Backbone, config: PruneConfig, scorer: Scorer, progress: Progress
    ) -> None:
        self.backbone, self.config = backbone, config.for_model(backbone)
        self.scorer, self.progress = scorer, progress
        self._surveys: Surveys = {}
        self._torch_pruning = TorchPruningRuns(backbone)
        self._groups: list[Group] | None = None

    def check(self, methods: Sequence[Method] = ()) -> None:
        """Refuse patterns that match nothing, before any row is made.

        Raises:
            OptionError: A pattern of ``protect`` or of a method's ``floor`` matches nothing, or
                ``protect`` leaves nothing to cut.
        """
        if self.config.protect:
            # The search for groups refuses patterns that match nothing.
            self._shared_groups()
        for method in methods:
            config = method.settings(self.config)
            if config.floor:
                raise_min_units(self._shared_groups(), config.floor)

    def row(self, method: Method, ratio: float, seed: int) -> dict[str, Any]:
        """Prune and score once.

        Returns:
            ``status``: ``"done"``, or ``"unreachable"`` if the method cannot reach the budget or
            does not apply to this model; ``reason`` of an unreachable row, otherwise None;
            ``macs, params, achieved, miou, pixel_accuracy, relative_error``, None without a tower;
            and ``seconds`` of the pruning, in which a shared survey counts in full.
        """
        clock = Clock()
        config = method.settings(replace(self.config, ratio=ratio, seed=seed))
        title = f"{method.name}, ratio {ratio:g}, seed {seed}"
        try:
            with self.progress.stage(f"pruning: {title}", 1) as advance:
                tower = self._prune(method, config, clock)
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
            "achieved": 1 - slim.of(config.budget) / dense.of(config.budget),
            **self.scorer.score(tower, title),
            "seconds": round(sum(clock.seconds.values()), 3),
        }

    def _prune(self, method: Method, config: PruneConfig, clock: Clock) -> nn.Module:
        # Without our recovery, Torch-Pruning cuts the original tower, as its users would run it.
        if method.source == "torch-pruning" and method.recovery is None:
            return self._prune_original(method, config, clock)
        selector: UnitSelector | None
        if method.source == "torch-pruning":
            selector = TorchPruningSelector(self._torch_pruning, method.criterion, config)
        else:
            selector = imp_selector(self.backbone, config, self.progress, clock)
        # imp_selector returns None for every other method.
        if selector is None:
            selector = CriterionSelector(self.backbone, config, self.progress, clock, self._surveys)
        return Pipeline(self.backbone, config, self.progress, clock, selector).run().tower

    def _prune_original(self, method: Method, config: PruneConfig, clock: Clock) -> nn.Module:
        """Return the tower that Torch-Pruning makes of the original tower, without our graph."""
        tower, preprocess = self.backbone.tower, self.backbone.preprocess
        pictures, _ = open_pictures(
            config.calibration, preprocess, config.pictures, HELD_OUT, config.seed, self.progress
        )
        run = self._torch_pruning.run(
            method.criterion, config, tower, self._shared_groups(), pictures, rewritten=False
        )
        tower = run.reach(config.ratio).tower
        clock.lap("prune")
        return tower

    def _shared_groups(self) -> list[Group]:
        """Return the groups that our methods may cut by default, found on a rewritten copy."""
        if self._groups is None:
            # SearchSpace.build rewrites its tower in place.
            dense = deepcopy(self.backbone.tower).eval().requires_grad_(False)
            space = SearchSpace.build(self.backbone, dense, protect=self.config.protect)
            self._groups = space.groups
        return self._groups
