"""Iterative magnitude pruning (IMP) of whole units: ``--method imp --imp-structured``.

The rounds are those of the paper (see :mod:`ovsprune.baselines.imp_weights`), with units in place
of single weights. The magnitude of a unit is the mean absolute value of its weights, so that heads
and MLP units, which have different numbers of weights, can be ranked together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from ovsprune.allocation.trim import cost, shared_costs, spare_budget, step_cost
from ovsprune.backbones import FAMILIES
from ovsprune.baselines.imp_checkpoint import RoundsFile
from ovsprune.baselines.masked_training import MaskedTraining
from ovsprune.core.clock import Clock
from ovsprune.core.progress import Progress
from ovsprune.core.protocols import AllocationContext, Backbone, Budget, Pictures, Stages
from ovsprune.core.records import Group, Plan, Scores
from ovsprune.graph.layers import bias_of, weight_of
from ovsprune.masks.magnitude import RATE
from ovsprune.pruning.config import PruneConfig
from ovsprune.pruning.search_space import min_units_by_group
from ovsprune.pruning.selection import Selection, SelectionContext

__all__ = ["ImpSelector", "imp_selector"]


class ImpSelector:
    """Selector that removes units by magnitude and trains the tower between the rounds.

    Args:
        backbone: Model to prune.
        config: Configuration with the method ``"imp"``.
        progress: Progress reporter.
        clock: Receives the seconds.
    """

    def __init__(
        self, backbone: Backbone, config: PruneConfig, progress: Progress, clock: Clock
    ) -> None:
        self.backbone, self.config = backbone, config.for_model(backbone)
        self.progress, self.clock = progress, clock

    def select(self, ctx: SelectionContext) -> Selection:
        """Return the units to keep, and the trained tower."""
        ranked = {
            "groups": min_units_by_group(ctx.groups),
            "budget": ctx.budget.kind,
            "target": ctx.budget.target,
        }
        rounds = RoundsFile(self.config, self.backbone, ctx.pictures, ranked, self.progress)
        plan, trained = prune_units(
            ctx.tower,
            ctx.groups,
            ctx.budget,
            ctx.pictures,
            FAMILIES.get(self.backbone.family).stages,
            self.config,
            rounds,
            self.progress,
        )
        self.clock.lap("imp")
        return Selection(plan, trained)


def imp_selector(
    backbone: Backbone, config: PruneConfig, progress: Progress, clock: Clock
) -> ImpSelector | None:
    """Return the selector of the method ``"imp"``; None for another method."""
    if config.method != "imp":
        return None
    return ImpSelector(backbone, config, progress, clock)


def prune_units(
    dense: nn.Module,
    groups: Sequence[Group],
    budget: Budget,
    pictures: Pictures,
    stages: Callable[[nn.Module], Stages],
    settings: PruneConfig,
    rounds: RoundsFile,
    progress: Progress,
) -> tuple[Plan, nn.Module]:
    """Alternate pruning and training until the budget is met.

    Return the plan, and a trained copy of the tower in which removed units are zero, not cut.
    """
    ctx = AllocationContext(groups=groups, scores=Scores({}, {}), budget=budget, curves=None)
    spare_budget(ctx)  # raises BudgetError before any training
    student = deepcopy(dense)
    resumed, widths_by_round = rounds.resume(student)
    training = MaskedTraining(
        student,
        dense,
        stages,
        pictures,
        batch_size=settings.batch_size,
        rate=settings.imp.lr,
        seed=settings.seed,
        done=len(widths_by_round) * settings.imp.steps,
    )
    kept = resumed or {g.name: torch.ones(g.units, dtype=torch.bool) for g in groups}
    masks = _masks(student, groups, kept)
    dense_sizes = unit_sizes(dense, groups)
    while cost(ctx, _widths(kept)) > budget.target:
        previous = masks
        kept = remove_smallest(ctx, kept, unit_sizes(student, groups), dense_sizes)
        masks = _masks(student, groups, kept)
        # Without rewinding, only units that the last round restores get their dense weights.
        restored = {name: mask & ~previous[name] for name, mask in masks.items()}
        training.rewind(None if settings.imp.rewind else restored)
        title = f"round {len(widths_by_round) + 1}"
        with progress.stage(title, settings.imp.steps) as advance:
            training.run(masks, settings.imp.steps, advance)
        widths_by_round.append(_widths(kept))
        rounds.save(student, kept, widths_by_round)
    plan = Plan({name: mask.nonzero().flatten() for name, mask in kept.items()})
    return plan, student.requires_grad_(False)


@torch.no_grad()
def unit_sizes(tower: nn.Module, groups: Sequence[Group]) -> dict[str, Tensor]:
    """Return the mean absolute weight of each unit: group name to float64 [units]."""
    sizes = {}
    for group in groups:
        total = torch.zeros(group.units, dtype=torch.float64)
        count = 0  # weights per unit
        for part in group.slices:
            weight = weight_of(tower.get_submodule(part.module))
            if weight.ndim == 1:
                continue  # the scale of a norm does not measure the unit
            axis = 0 if part.axis == "out" else 1
            sums = weight.double().abs().sum([d for d in range(weight.ndim) if d != axis])
            total += sums.cpu()[part.rows].sum(1)  # sums: [channels]; rows: [units, width]
            count += weight.numel() // weight.shape[axis] * part.rows.shape[1]
        sizes[group.name] = total / count
    return sizes


def remove_smallest(
    ctx: AllocationContext,
    kept: dict[str, Tensor],
    sizes: dict[str, Tensor],
    dense_sizes: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Remove the smallest tenth of the remaining units; no group falls below its minimum.

    In the last round, a unit whose removal would leave less than the budget is skipped, and smaller
    costs are tried. If no unit is cheap enough, one of the cheapest is removed, and the largest
    removed units that fit into the budget are restored. The budget is thus met up to the cost of
    the cheapest unit.

    ``kept`` and the result map group names to bool [units]; ``sizes`` and ``dense_sizes`` map them
    to float64 [units]. Removed units are ranked by their size in the dense tower.
    """
    groups = {g.name: g for g in ctx.groups}
    kept = {name: mask.clone() for name, mask in kept.items()}
    widths = _widths(kept)
    quota = max(1, round(RATE * sum(widths.values())))
    current, target, shared = cost(ctx, widths), ctx.budget.target, shared_costs(ctx)
    ranked = [(float(sizes[n][u]), n, int(u)) for n in kept for u in kept[n].nonzero().flatten()]
    # Without the key, ties would be broken by name; a stable sort keeps the order of the groups.
    ranked.sort(key=lambda entry: entry[0])

    # The price at the present widths: with shared costs it changes with every removed unit.
    def unit_price(name: str) -> float:
        return -step_cost(ctx.budget, groups[name], widths[name] - 1, widths, shared)

    def remove(allowed: Callable[[float], bool], limit: int) -> int:
        """Remove up to ``limit`` units of an allowed price; return their number."""
        nonlocal current
        removed = 0
        for _, name, unit in ranked:
            if not kept[name][unit] or widths[name] <= groups[name].min_units:
                continue
            price = unit_price(name)
            if removed < limit and allowed(price):
                kept[name][unit] = False
                widths[name] -= 1
                current -= price
                removed += 1
        return removed

    removed = remove(lambda price: current - price >= target, quota)
    if removed < quota and current > target:
        free = [g for g in ctx.groups if widths[g.name] > g.min_units]
        cheapest = min(unit_price(g.name) for g in free)
        remove(lambda price: price <= cheapest, 1)
        lost = [(float(dense_sizes[n][u]), n, int(u)) for n in kept for u in (~kept[n]).nonzero()]
        for _, name, unit in sorted(lost, key=lambda entry: -entry[0]):
            wider = {**widths, name: widths[name] + 1}
            if cost(ctx, wider) <= target:
                kept[name][unit] = True
                widths = wider
    return kept


def _widths(kept: dict[str, Tensor]) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in kept.items()}


def _masks(tower: nn.Module, groups: Sequence[Group], kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return masks that zero the weights of removed units; a layer may be in several groups.

    If a norm lies between the units and their consumer, the biases of the units are masked too: the
    norm would see them, and the slim tower has none.
    """
    masks: dict[str, Tensor] = {}

    def clear(name: str, parameter: Tensor, axis: int, rows: Tensor) -> None:
        mask = masks.setdefault(name, torch.ones(parameter.shape, dtype=torch.bool))
        mask.index_fill_(axis, rows, False)

    for group in groups:
        for part in group.slices:
            layer = tower.get_submodule(part.module)
            weight, bias = weight_of(layer), bias_of(layer)
            if weight.ndim == 1:
                continue
            rows = part.rows[~kept[group.name]].flatten()
            clear(f"{part.module}.weight", weight, 0 if part.axis == "out" else 1, rows)
            if group.norms and part.axis == "out" and bias is not None:
                clear(f"{part.module}.bias", bias, 0, rows)
    return masks
