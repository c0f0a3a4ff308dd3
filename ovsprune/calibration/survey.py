"""Survey of the dense tower: scores of every group and, if needed, its error by width.

The blocks are processed in sequence (llm-compressor: "sequential" pipeline). For each block, the
second moments of the consumers' inputs are computed, and the criterion scores the units.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ovsprune.calibration.activation_cache import (
    ActivationCache,
    evenly_spaced,
    run_block,
    run_stem,
)
from ovsprune.calibration.gradients import mask_gradients
from ovsprune.calibration.moments import SecondMoments
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
from ovsprune.graph.rows import flat_columns, input_rows

__all__ = ["Survey"]


class Survey:
    """Scores of the groups' units and sensitivity curves, computed block by block.

    The residual stream of all images is cached. Activations inside a block exist for one batch at a
    time, and the moments of one block are freed before those of the next are computed.

    Args:
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

    def __init__(
        self,
        tower: nn.Module,
        stages: Stages,
        groups: Sequence[Group],
        criterion: Criterion,
        pictures: Pictures,
        *,
        batch_size: int,
        ridge: float,
        seed: int,
        probe: int,
        progress: Progress,
    ) -> None:
        self.tower, self.stages, self.groups = tower, stages, groups
        self.criterion, self.pictures = criterion, pictures
        self.batch_size, self.ridge, self.seed, self.probe = batch_size, ridge, seed, probe
        self.progress = progress
        self.device = next(tower.parameters()).device
        self._gradients: Mapping[str, Tensor] = {}
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
            self._gradients = self._differentiate()
        if not ("moments" in needs or self.probe):
            for group in self.groups:
                self._record_ranking(group, self._rank(group, None))
            return Scores(self._costs, self._orders), None
        with self.progress.stage("calibration pictures", 1) as advance:
            cache = run_stem(self.stages, self.pictures, self.batch_size)
            advance(1)
        probe = evenly_spaced(len(cache), self.probe)  # int64 [probe]
        error = self._final_error(cache[probe]) if self.probe else None
        with self.progress.stage("measuring groups", len(self.groups)) as advance:
            for name, block in self.stages.blocks.items():
                groups = [g for g in self.groups if g.block == name]
                # Curves need the input of the block, which the cache overwrites with its output.
                before = cache[probe].clone()
                moments = self._advance(name, block, groups, cache)
                for group in groups:
                    self._measure(group, moments[group.consumer], before, error)
                    advance(1)
        curves = Curves(self._widths, self._errors) if self.probe else None
        return Scores(self._costs, self._orders), curves

    def _measure(
        self, group: Group, moments: Moments, before: Tensor, error: FeatureError | None
    ) -> None:
        ranking = self._rank(group, moments)
        self._record_ranking(group, ranking)
        if error is None:
            return
        names = list(self.stages.blocks)
        remaining = [self.stages.blocks[name] for name in names[names.index(group.block) :]]
        run = self._runner(before, remaining, error)
        consumer = self.tower.get_submodule(group.consumer)
        weights = ranking.weights or self._refits(group, consumer, moments, ranking.order)
        errors = measure_curve(group, consumer, moments, weights, run)
        self._record_curve(group, errors)

    def _record_curve(self, group: Group, errors: Mapping[int, float]) -> None:
        curve = dict(sorted(errors.items()))
        self._widths[group.name] = torch.tensor(list(curve))
        self._errors[group.name] = torch.tensor(list(curve.values()), dtype=torch.float64)

    def _rank(self, group: Group, moments: Moments | None) -> Ranking:
        # A generator per group: random scores do not depend on the other groups or their order.
        generator = torch.Generator().manual_seed(self.seed ^ zlib.crc32(group.name.encode()))
        layers = {s.module: self.tower.get_submodule(s.module) for s in group.slices}
        widths = self._grid(group) if self.probe else ()
        gradients = self._gradients.get(group.name)
        if gradients is not None:
            gradients = gradients.double()
        return self.criterion.score(
            GroupContext(
                group=group,
                layers=layers,
                moments=moments,
                ridge=self.ridge,
                generator=generator,
                snapshots=widths,
                gradients=gradients,
            )
        )

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

    def _differentiate(self) -> dict[str, Tensor]:
        return mask_gradients(
            self.tower,
            self.stages,
            self.groups,
            cast(GradientCriterion, self.criterion).objective,
            self.pictures,
            batch_size=self.batch_size,
            seed=self.seed,
            progress=self.progress,
        )

    def _record_ranking(self, group: Group, ranking: Ranking) -> None:
        self._costs[group.name], self._orders[group.name] = ranking.costs, ranking.order

    def _refits(
        self, group: Group, consumer: nn.Module, moments: Moments, order: Tensor
    ) -> dict[int, Tensor]:
        return prune_columns(
            weight_of(consumer).detach().flatten(1).cpu(),
            regularised(moments.covariance, self.ridge),
            flat_columns(consumer, group.columns),
            order=order,
            snapshots=self._grid(group),
        ).weights

    def _grid(self, group: Group) -> tuple[int, ...]:
        """Return the widths at which the group's curve is measured."""
        points = points_for_depth(len(self.stages.blocks))
        return width_grid(group.units, group.min_units, points)

    def _advance(
        self, name: str, block: nn.Module, groups: Sequence[Group], cache: ActivationCache
    ) -> dict[str, Moments]:
        """Advance the cache by one block; return the moments of each consumer's input."""
        layers = {g.consumer: self.tower.get_submodule(g.consumer) for g in groups}
        moments = {
            n: SecondMoments(weight_of(layer).flatten(1).shape[1]) for n, layer in layers.items()
        }
        points = [(consumer, "input") for consumer in layers]
        for _, captured in run_block(block, cache, self.batch_size, points, name, advance=True):
            for consumer, sums in moments.items():
                x = input_rows(layers[consumer], captured[consumer, "input"])  # [b, ..., n]
                sums.update(x)
        return {consumer: sums.result() for consumer, sums in moments.items()}

    def _final_error(self, stream: Tensor) -> FeatureError:
        return FeatureError(*self._finish(stream, list(self.stages.blocks.values())))

    def _runner(
        self, before: Tensor, blocks: Sequence[nn.Module], error: FeatureError
    ) -> Callable[[], float]:
        return lambda: error(*self._finish(before, blocks))

    def _finish(self, stream: Tensor, blocks: Sequence[nn.Module]) -> tuple[Tensor, Tensor]:
        parts = []
        for start in range(0, len(stream), self.batch_size):
            part = stream[start : start + self.batch_size].to(self.device)
            for block in blocks:
                part = block(part)
            pooled, dense = self.stages.head(part)
            parts.append((pooled.float().cpu(), dense.float().cpu()))
        return torch.cat([p for p, _ in parts]), torch.cat([d for _, d in parts])
