"""One walk through the dense tower: every group's ranking, and its error by width if wanted."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ovsprune.calibration.activation_cache import Stream, run_stem, walk
from ovsprune.calibration.gradients import mask_gradients
from ovsprune.calibration.moments import SecondMoments
from ovsprune.calibration.obs import prune_columns
from ovsprune.calibration.ridge import regularised
from ovsprune.calibration.sensitivity import (
    FeatureError,
    grid,
    measure_curve,
    points_for,
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
    """Ranks groups, and measures their curves, block after block.

    The residual stream of all pictures is kept; activations inside a block are seen a batch at a
    time, and one block's moments are dropped before the next block's are gathered.

    Args:
        tower: The dense, rewritten tower.
        stages: Its blocks.
        groups: What may be cut.
        criterion: Ranks the units.
        pictures: Calibration pictures.
        batch_size: Pictures at a time.
        ridge: Relative ridge on second moments.
        seed: For criteria that draw.
        probe: Pictures on which curves are measured; 0 measures none.
        progress: Shows the walk.
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
        """Walk the tower once, after one pass with gradients where the criterion needs them.

        Raises:
            OptionError: The criterion needs norms, and a group has none; or its objective cannot be
                used (:func:`ovsprune.calibration.gradients.mask_gradients`).
        """
        needs = self.criterion.needs
        self._check_norms()
        if "gradients" in needs:
            self._gradients = self._differentiate()
        if not ("moments" in needs or self.probe):
            for group in self.groups:
                self._keep(group, self._rank(group, None))
            return Scores(self._costs, self._orders), None
        with self.progress.stage("calibration pictures", 1) as advance:
            stream = run_stem(self.stages, self.pictures, self.batch_size)
            advance(1)
        # Spread over the pictures: a folder may be sorted.
        probe = torch.linspace(0, len(stream) - 1, min(self.probe, len(stream))).round().long()
        error = self._final_error(stream[probe]) if self.probe else None
        with self.progress.stage("measuring groups", len(self.groups)) as advance:
            for name, block in self.stages.blocks.items():
                groups = [g for g in self.groups if g.block == name]
                before = stream[probe].clone()
                moments = self._advance(name, block, groups, stream)
                for group in groups:
                    self._measure(group, moments[group.consumer], before, error)
                    advance(1)
        curves = Curves(self._widths, self._errors) if self.probe else None
        return Scores(self._costs, self._orders), curves

    def _measure(
        self, group: Group, moments: Moments, before: Tensor, error: FeatureError | None
    ) -> None:
        ranking = self._rank(group, moments)
        self._keep(group, ranking)
        if error is None:
            return
        rest = list(self.stages.blocks)[list(self.stages.blocks).index(group.block) :]
        run = self._runner(before, [self.stages.blocks[name] for name in rest], error)
        consumer = self.tower.get_submodule(group.consumer)
        weights = ranking.weights or self._refits(group, consumer, moments, ranking.order)
        errors = measure_curve(group, consumer, moments, weights, run)
        self._note(group, errors)

    def _note(self, group: Group, errors: Mapping[int, float]) -> None:
        found = dict(sorted(errors.items()))
        self._widths[group.name] = torch.tensor(list(found))
        self._errors[group.name] = torch.tensor(list(found.values()), dtype=torch.float64)

    def _rank(self, group: Group, moments: Moments | None) -> Ranking:
        generator = torch.Generator().manual_seed(self.seed ^ zlib.crc32(group.name.encode()))
        layers = {s.module: self.tower.get_submodule(s.module) for s in group.slices}
        widths = self._grid(group) if self.probe else ()
        gradients = self._gradients.get(group.name)
        if gradients is not None:
            gradients = gradients.double()
        return self.criterion.score(
            GroupContext(group, layers, moments, self.ridge, generator, widths, gradients)
        )

    def _check_norms(self) -> None:
        bare = [g for g in self.groups if not g.norms] if "norms" in self.criterion.needs else []
        if bare:
            raise OptionError(
                f"{type(self.criterion).__name__} ranks units by the scale of a norm behind them, "
                f"and {bare[0].name} ({len(bare)} of {len(self.groups)} groups) has none before "
                f"{bare[0].consumer}; take --criterion reconstruction or magnitude, which rank any "
                f"group, or leave such groups whole with --protect {bare[0].name!r}"
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

    def _keep(self, group: Group, ranking: Ranking) -> None:
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
        """Widths at which the group's curve is measured."""
        return grid(group.units, group.min_units, points_for(len(self.stages.blocks)))

    def _advance(
        self, name: str, block: nn.Module, groups: Sequence[Group], stream: Stream
    ) -> dict[str, Moments]:
        """Run one block over the whole stream, in place; moments of what each consumer reads."""
        layers = {g.consumer: self.tower.get_submodule(g.consumer) for g in groups}
        sums = {
            n: SecondMoments(weight_of(layer).flatten(1).shape[1]) for n, layer in layers.items()
        }
        taps = [(consumer, "input") for consumer in layers]
        for _, seen in walk(block, stream, self.batch_size, taps, name, advance=True):
            for consumer, found in sums.items():
                found.update(input_rows(layers[consumer], seen[consumer, "input"]))
        return {consumer: found.result() for consumer, found in sums.items()}

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
