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

from ovsprune.allocation.trim import cost, partners, spare, step_price
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

__all__ = ["ImpSelector", "imp_selector", "prune_units", "remove_smallest", "unit_sizes"]


class ImpSelector:
    """Selects units by iterative magnitude pruning, and trains the tower in between.

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
        """Select units, and return the trained tower with them.

        Raises:
            BudgetError: The minimum units of the groups cost more than the budget.
            DataError: The file of rounds belongs to another training.
        """
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
    """Remove a tenth of the units that remain a round, training in between, down to the budget.

    Args:
        dense: The rewritten tower; left as it is.
        groups: What may be cut.
        budget: What must remain.
        pictures: Calibration pictures.
        stages: A tower's blocks and head.
        settings: Of the prune.
        rounds: Where the last round is kept, and may be there already.
        progress: Shows the rounds.

    Returns:
        The plan, and a trained copy of the tower, not cut yet, whose removed units are zero.

    Raises:
        BudgetError: The floors cost more than the budget.
    """
    ctx = AllocationContext(groups, Scores({}, {}), budget, None)
    spare(ctx)
    student = deepcopy(dense)
    resumed, done = rounds.resume(student)
    training = MaskedTraining(
        student,
        dense,
        stages,
        pictures,
        batch_size=settings.batch_size,
        rate=settings.imp.lr,
        seed=settings.seed,
        done=len(done) * settings.imp.steps,
    )
    kept = resumed or {g.name: torch.ones(g.units, dtype=torch.bool) for g in groups}
    masks = _masks(student, groups, kept)
    first = unit_sizes(dense, groups)
    while cost(ctx, {name: int(k.sum()) for name, k in kept.items()}) > budget.target:
        before, kept = masks, remove_smallest(ctx, kept, unit_sizes(student, groups), first)
        masks = _masks(student, groups, kept)
        # what came back in the last round comes with its dense weights
        training.rewind(
            None if settings.imp.rewind else {n: m & ~before[n] for n, m in masks.items()}
        )
        with progress.stage(f"round {len(done) + 1}", settings.imp.steps) as advance:
            training.run(masks, settings.imp.steps, advance)
        done.append({name: int(k.sum()) for name, k in kept.items()})
        rounds.save(student, kept, done)
    plan = Plan({name: k.nonzero().flatten() for name, k in kept.items()})
    return plan, student.requires_grad_(False)


@torch.no_grad()
def unit_sizes(tower: nn.Module, groups: Sequence[Group]) -> dict[str, Tensor]:
    """Mean absolute value of the weights that go with each unit: group name to float64 [units]."""
    sizes = {}
    for group in groups:
        total = torch.zeros(group.units, dtype=torch.float64)
        count = 0
        for part in group.slices:
            weight = weight_of(tower.get_submodule(part.module))
            if weight.ndim == 1:
                continue  # the scale of a norm is no size of the unit
            axis = 0 if part.axis == "out" else 1
            lines = weight.double().abs().sum([d for d in range(weight.ndim) if d != axis])
            total += lines.cpu()[part.rows].sum(1)
            count += weight.numel() // weight.shape[axis] * part.rows.shape[1]
        sizes[group.name] = total / count
    return sizes


def remove_smallest(
    ctx: AllocationContext,
    kept: dict[str, Tensor],
    sizes: dict[str, Tensor],
    first: dict[str, Tensor],
) -> dict[str, Tensor]:
    """One round: a tenth of the units that remain go, the smallest first, none below a floor.

    Near the budget, a unit whose removal would go beyond it is passed over for finer ones. When
    none is fine enough any more, one of the cheapest ends it, and of all units that are gone, the
    largest that fit come back. So the budget is met within the finest unit.

    Args:
        ctx: Groups and budget.
        kept: Group name to bool [units], what is left before.
        sizes: Group name to float64 [units], now.
        first: The same in the dense tower, for those that are gone.

    Returns:
        What is left after.
    """
    groups = {g.name: g for g in ctx.groups}
    kept = {name: mask.clone() for name, mask in kept.items()}
    widths = {name: int(mask.sum()) for name, mask in kept.items()}
    quota = max(1, round(RATE * sum(widths.values())))
    now, target, shared = cost(ctx, widths), ctx.budget.target, partners(ctx)
    left = [(float(sizes[n][u]), n, int(u)) for n in kept for u in kept[n].nonzero().flatten()]
    left.sort(key=lambda entry: entry[0])

    def unit_price(name: str) -> float:
        return -step_price(ctx.budget, groups[name], widths[name] - 1, widths, shared)

    def remove(within: Callable[[float], bool], most: int) -> int:
        nonlocal now
        gone = 0
        for _, name, unit in left:
            price = unit_price(name)
            if not kept[name][unit] or widths[name] <= groups[name].min_units:
                continue
            if gone < most and within(price):
                kept[name][unit] = False
                widths[name] -= 1
                now -= price
                gone += 1
        return gone

    gone = remove(lambda price: now - price >= target, quota)
    if gone < quota and now > target:
        free = [g for g in ctx.groups if widths[g.name] > g.min_units]
        cheapest = min(unit_price(g.name) for g in free)
        remove(lambda price: price <= cheapest, 1)
        away = [(float(first[n][u]), n, int(u)) for n in kept for u in (~kept[n]).nonzero()]
        for _, name, unit in sorted(away, key=lambda entry: -entry[0]):
            wider = {**widths, name: widths[name] + 1}
            if cost(ctx, wider) <= target:
                kept[name][unit] = True
                widths = wider
    return kept


def _masks(tower: nn.Module, groups: Sequence[Group], kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """Masks of what goes with removed units; a layer may be in several groups.

    Where a norm stands between units and consumer, the biases of what makes them are masked too:
    the norm would see them, and the slim tower's does not.
    """
    masks: dict[str, Tensor] = {}

    def clear(name: str, like: Tensor, axis: int, rows: Tensor) -> None:
        mask = masks.setdefault(name, torch.ones(like.shape, dtype=torch.bool))
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
