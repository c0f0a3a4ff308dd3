"""Survey of the dense tower: scores of every group and, if needed, its error by width.

The blocks are processed in sequence (llm-compressor: "sequential" pipeline). For each block, the
second moments of the consumers' inputs are computed, and the criterion scores the units. The
moments of one block are freed before those of the next are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import cast
from zlib import crc32

import torch
from torch import Tensor, nn

from ovsprune.calibration.activation_cache import evenly_spaced, run_stem
from ovsprune.calibration.gradients import mask_gradients
from ovsprune.calibration.moments import advance_with_moments
from ovsprune.calibration.obs import prune_columns
from ovsprune.calibration.ridge import regularised
from ovsprune.calibration.sensitivity import (
    FeatureError,
    measure_curve,
    points_for_depth,
    width_grid,
)
from ovsprune.core.errors import OptionError
from ovsprune.core.progress import Progress
from ovsprune.core.protocols import (
    Criterion,
    GradientCriterion,
    GroupContext,
    Moments,
    Pictures,
    Ranking,
    Stages,
)
from ovsprune.core.records import Curves, Group, Scores
from ovsprune.graph.layers import weight_of
from ovsprune.graph.rows import flat_columns

__all__ = ["Survey"]


@dataclass(eq=False)
class Survey:
    """Computation of scores and sensitivity curves of all groups, block by block.

    Attributes:
        tower: Dense tower in rewritten form.
        stages: The tower as a sequence of blocks.
        groups: Groups that may be cut.
        criterion: Importance criterion.
        pictures: Calibration images.
        batch_size: Images per batch.
        ridge: Relative ridge on second moments.
        seed: Seed of criteria that draw random numbers.
        probe: Number of images for curves; 0 for no curves.
        progress: Progress reporter.
    """

    tower: nn.Module
    stages: Stages
    groups: Sequence[Group]
    criterion: Criterion
    pictures: Pictures
    _: KW_ONLY
    batch_size: int
    ridge: float
    seed: int
    probe: int
    progress: Progress

    def __post_init__(self) -> None:
        self.device = next(self.tower.parameters()).device
        self._gradients: Mapping[str, Tensor] = {}
        # Results by group name, see Scores and Curves.
        self._costs: dict[str, Tensor] = {}
        self._orders: dict[str, Tensor] = {}
        self._widths: dict[str, Tensor] = {}
        self._errors: dict[str, Tensor] = {}

    @torch.no_grad()
    def run(self) -> tuple[Scores, Curves | None]:
        """Run the survey.

        If the criterion needs gradients, one pass with gradients precedes the forward pass.

        Returns:
            Scores, and curves if ``probe`` is above 0.

        Raises:
            OptionError: The criterion needs norms and a group has none, or its objective cannot be
                differentiated (:func:`ovsprune.calibration.gradients.mask_gradients`).
        """
        needs = self.criterion.needs
        self._check_norms()
        if "gradients" in needs:
            self._gradients = mask_gradients(
                self.tower,
                self.stages,
                self.groups,
                cast(GradientCriterion, self.criterion).objective,
                self.pictures,
                batch_size=self.batch_size,
                seed=self.seed,
                progress=self.progress,
            )
        if not ("moments" in needs or self.probe):
            # The criterion reads weights or gradients only: no forward pass is needed.
            for group in self.groups:
                self._rank(group, None)
            return Scores(self._costs, self._orders), None
        with self.progress.stage("calibration pictures", 1) as advance:
            cache = run_stem(self.stages, self.pictures, self.batch_size)
            advance(1)
        probe = evenly_spaced(len(cache), self.probe)  # int64 [probe]
        blocks = list(self.stages.blocks.values())
        error = FeatureError(*self._finish(cache[probe], blocks)) if self.probe else None
        with self.progress.stage("measuring groups", len(self.groups)) as advance:
            for position, (name, block) in enumerate(self.stages.blocks.items()):
                groups = [g for g in self.groups if g.block == name]
                # Curves need the input of the block, which the cache overwrites with its output.
                before = cache[probe].clone()  # [probe, ...]
                consumers = {g.consumer: self.tower.get_submodule(g.consumer) for g in groups}
                sums = advance_with_moments(block, consumers, cache, self.batch_size, name)
                moments = {consumer: s.result() for consumer, s in sums.items()}
                for group in groups:
                    ranking = self._rank(group, moments[group.consumer])
                    if error is not None:
                        rest = partial(self._error_after, error, before, blocks[position:])
                        self._measure_curve(group, moments[group.consumer], ranking, rest)
                    advance(1)
        curves = Curves(self._widths, self._errors) if self.probe else None
        return Scores(self._costs, self._orders), curves

    def _check_norms(self) -> None:
        if "norms" not in self.criterion.needs:
            return
        lacking = [g for g in self.groups if not g.norms]
        if lacking:
            raise OptionError(
                f"{type(self.criterion).__name__} scores units by the scale of a norm after them, "
                f"but {lacking[0].name} ({len(lacking)} of {len(self.groups)} groups) has no norm "
                f"before {lacking[0].consumer}. Use --criterion reconstruction or magnitude, which "
                f"work for any group, or exclude the group with --protect {lacking[0].name!r}"
            )

    def _rank(self, group: Group, moments: Moments | None) -> Ranking:
        """Score the units of a group, and store the costs and the order."""
        gradients = self._gradients.get(group.name)  # float32 [samples, units]
        ranking = self.criterion.score(
            GroupContext(
                group=group,
                layers={s.module: self.tower.get_submodule(s.module) for s in group.slices},
                moments=moments,
                ridge=self.ridge,
                # A generator per group: random scores do not depend on the other groups.
                generator=torch.Generator().manual_seed(self.seed ^ crc32(group.name.encode())),
                snapshots=self._grid(group) if self.probe else (),
                gradients=None if gradients is None else gradients.double(),
            )
        )
        self._costs[group.name], self._orders[group.name] = ranking.costs, ranking.order
        return ranking

    def _measure_curve(
        self, group: Group, moments: Moments, ranking: Ranking, run: Callable[[], float]
    ) -> None:
        """Store the error by width of a group; ``run`` returns the error of the changed tower."""
        consumer = self.tower.get_submodule(group.consumer)
        weights = ranking.weights
        if not weights:
            # The criterion did not refit the consumer: do so in the order of removal it gave.
            weights = prune_columns(
                weight_of(consumer).detach().flatten(1).cpu(),
                regularised(moments.covariance, self.ridge),
                flat_columns(consumer, group.columns),
                order=ranking.order,
                snapshots=self._grid(group),
            ).weights
        curve = dict(sorted(measure_curve(group, consumer, moments, weights, run).items()))
        self._widths[group.name] = torch.tensor(list(curve))
        self._errors[group.name] = torch.tensor(list(curve.values()), dtype=torch.float64)

    def _grid(self, group: Group) -> tuple[int, ...]:
        """Return the widths at which the group's curve is measured."""
        points = points_for_depth(len(self.stages.blocks))
        return width_grid(group.units, group.min_units, points)

    def _error_after(
        self, error: FeatureError, stream: Tensor, blocks: Sequence[nn.Module]
    ) -> float:
        return error(*self._finish(stream, blocks))

    def _finish(self, stream: Tensor, blocks: Sequence[nn.Module]) -> tuple[Tensor, Tensor]:
        """Run the last blocks; return pooled [probe, C] and dense [probe, C, h, w] features."""
        parts = []
        for start in range(0, len(stream), self.batch_size):
            part = stream[start : start + self.batch_size].to(self.device)
            for block in blocks:
                part = block(part)
            pooled, dense = self.stages.head(part)
            parts.append((pooled.float().cpu(), dense.float().cpu()))
        return torch.cat([p for p, _ in parts]), torch.cat([d for _, d in parts])
