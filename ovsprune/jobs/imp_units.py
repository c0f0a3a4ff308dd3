"""Iterative magnitude pruning of whole units: what ``--imp-structured`` ranks, removes and trains.

The paper's rounds (see :mod:`ovsprune.jobs.imp`), with a unit of a group in the place of a single
weight: a unit's size is the mean absolute value of the weights that go with it, so that a head and
an MLP unit, which differ much in how many those are, can be ranked together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from ovsprune.allocation.trim import cost, spare
from ovsprune.calibration.masked_training import MaskedTraining
from ovsprune.core.progress import Progress
from ovsprune.core.protocols import AllocationContext, Budget, Pictures, Stages
from ovsprune.core.records import Group, Plan, Scores
from ovsprune.graph.layers import weight_of
from ovsprune.jobs.settings import Settings
from ovsprune.masks.magnitude import RATE

__all__ = ["prune_units", "remove_smallest", "unit_sizes"]


def prune_units(
    dense: nn.Module,
    groups: Sequence[Group],
    budget: Budget,
    pictures: Pictures,
    stages: Callable[[nn.Module], Stages],
    settings: Settings,
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
        progress: Shows the rounds.

    Returns:
        The plan, and a trained copy of the tower, not cut yet, whose removed units are zero.

    Raises:
        BudgetError: The floors cost more than the budget.
    """
    item = AllocationContext(groups, Scores({}, {}), budget, None)
    spare(item)
    student = deepcopy(dense)
    training = MaskedTraining(
        student,
        dense,
        stages,
        pictures,
        batch_size=settings.batch_size,
        rate=settings.imp_lr,
        seed=settings.seed,
    )
    kept = {g.name: torch.ones(g.units, dtype=torch.bool) for g in groups}
    number = 0
    while cost(item, {name: int(k.sum()) for name, k in kept.items()}) > budget.target:
        number += 1
        kept = remove_smallest(item, kept, unit_sizes(student, groups))
        if settings.imp_rewind:
            training.rewind()
        with progress.stage(f"round {number}", settings.imp_steps) as advance:
            training.run(_masks(student, groups, kept), settings.imp_steps, advance)
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
    item: AllocationContext, kept: dict[str, Tensor], sizes: dict[str, Tensor]
) -> dict[str, Tensor]:
    """One round: a tenth of the units that remain go, the smallest first, none below a floor.

    The last round stops at the budget, and then takes units back, the largest first, as far as
    they fit: so the budget is met within one unit.

    Args:
        item: Groups and budget.
        kept: Group name to bool [units], what is left before.
        sizes: Group name to float64 [units].

    Returns:
        What is left after.
    """
    groups = {g.name: g for g in item.groups}
    kept = {name: mask.clone() for name, mask in kept.items()}
    widths = {name: int(mask.sum()) for name, mask in kept.items()}
    quota = max(1, round(RATE * sum(widths.values())))
    left = [(float(sizes[n][u]), n, int(u)) for n in kept for u in kept[n].nonzero().flatten()]
    gone: list[tuple[str, int]] = []
    now = cost(item, widths)
    for _, name, unit in sorted(left, key=lambda entry: entry[0]):
        if len(gone) == quota or now <= item.budget.target:
            break
        if widths[name] > groups[name].floor:
            widths[name] -= 1
            now -= item.budget.unit(groups[name])
            kept[name][unit] = False
            gone.append((name, unit))
    if now > item.budget.target:
        return kept
    for name, unit in reversed(gone):
        price = item.budget.unit(groups[name])
        if now + price <= item.budget.target:
            now += price
            kept[name][unit] = True
    return kept


def _masks(tower: nn.Module, groups: Sequence[Group], kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """Masks of the weights that go with removed units; a layer may be in several groups."""
    masks: dict[str, Tensor] = {}
    for group in groups:
        for part in group.slices:
            weight = weight_of(tower.get_submodule(part.module))
            if weight.ndim == 1:
                continue
            name = f"{part.module}.weight"
            mask = masks.setdefault(name, torch.ones(weight.shape, dtype=torch.bool))
            rows = part.rows[~kept[group.name]].flatten()
            mask.index_fill_(0 if part.axis == "out" else 1, rows, False)
    return masks
