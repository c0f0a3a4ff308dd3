"""Unit selector that runs Torch-Pruning."""

from __future__ import annotations

from torch import nn

from ovsprune.backbones import FAMILIES
from ovsprune.baselines.torch_pruning import (
    TORCH_PRUNING_METHODS,
    TorchPruning,
    feature_gradients,
)
from ovsprune.core.protocols import Backbone, Pictures
from ovsprune.core.records import Group
from ovsprune.pruning.config import PruneConfig
from ovsprune.pruning.selection import Selection, SelectionContext

__all__ = ["TorchPruningRuns", "TorchPruningSelector"]


class TorchPruningRuns:
    """Runs of Torch-Pruning on one model; rows of a comparison share gradients and tried ratios.

    Args:
        backbone: Dense model.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        # The key is everything except the ratio that distinguishes two runs.
        self._runs: dict[tuple[str, bool, int | None], TorchPruning] = {}

    def run(
        self,
        method: str,
        config: PruneConfig,
        tower: nn.Module,
        groups: list[Group],
        pictures: Pictures,
        *,
        rewritten: bool,
    ) -> TorchPruning:
        """Return Torch-Pruning for a tower, original or rewritten; equal runs share one object.

        Args:
            method: Name in :data:`TORCH_PRUNING_METHODS`.
            config: Configuration; gives budget, rounding, batch size and seed.
            tower: Tower; it is not changed.
            groups: Groups that may be cut.
            pictures: Calibration images.
            rewritten: True if ``tower`` is rewritten.
        """
        options = TORCH_PRUNING_METHODS[method]
        key = (method, rewritten, config.seed if options.taylor else None)
        if key not in self._runs:
            gradients = {}
            if options.taylor:
                stages = FAMILIES.get(self.backbone.family).stages
                gradients = feature_gradients(
                    tower, stages, pictures, config.batch_size, config.seed
                )
            self._runs[key] = TorchPruning(
                name=method,
                method=options,
                tower=tower,
                groups=groups,
                size=self.backbone.preprocess.size,
                gradients=gradients,
                budget=config.budget,
                round_to=config.round_to,
            )
        return self._runs[key]


class TorchPruningSelector:
    """Selector of the units that Torch-Pruning keeps on the rewritten tower.

    Args:
        runs: Shared runs.
        method: Name in :data:`TORCH_PRUNING_METHODS`.
        config: Configuration of the row.
    """

    def __init__(self, runs: TorchPruningRuns, method: str, config: PruneConfig) -> None:
        self.runs, self.method, self.config = runs, method, config

    def select(self, ctx: SelectionContext) -> Selection:
        """Return the units that Torch-Pruning keeps within the budget."""
        run = self.runs.run(
            self.method, self.config, ctx.tower, ctx.groups, ctx.pictures, rewritten=True
        )
        return Selection(run.reach(1 - ctx.budget.target / ctx.budget.dense).plan)
