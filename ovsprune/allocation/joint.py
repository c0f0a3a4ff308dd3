"""Heads and the widths inside them chosen together, around an allocator that has measured curves.

What an attention costs is a product: heads times the widths of one head. An allocator's prices are
a sum. So each attention is shown to it as one group, whose widths are states (heads, directions of
queries and keys, directions of values) with the true cost of each, counted out, and the sum of the
three measured errors. Of all states those remain that no other beats in both (the Pareto front),
in rising order of cost; that is a group as any other, with a table of prices. The budget is met as
exactly as without, in one pass.

States have one width for queries, keys and values where both may be cut: fused attention (torch's
on CPUs, flash attention) takes no other, and other kernels are slower by more than it saves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from ovsprune.allocation.curves import curve
from ovsprune.allocation.trim import kept_price, widths_of
from ovsprune.core.protocols import AllocationContext, Allocator
from ovsprune.core.records import Curves, Group

__all__ = ["direction_step", "joint_widths"]

Widths = dict[str, int]


def joint_widths(allocator: Allocator, item: AllocationContext) -> Widths:
    """Widths by ``allocator``, of groups of heads together with the directions inside them.

    Without directions these are the allocator's own.

    Args:
        allocator: One that needs curves, where there are directions: no criterion ranks them.
        item: Groups with ``inside``, and the groups that they name.

    Raises:
        BudgetError: The floors cost more than the budget.
    """
    fronts = {
        group.name: _front(item, group, inner)
        for group in item.groups
        if (inner := [g for g in item.groups if g.inside == group.name])
    }
    if not fronts:
        return allocator.widths(item)
    assert item.curves is not None
    whole = [g for g in item.groups if g.inside is None and g.name not in fronts]
    widths, errors = dict(item.curves.widths), dict(item.curves.errors)
    for name, front in fronts.items():
        widths[name] = torch.arange(len(front.states))
        errors[name] = torch.tensor(front.errors, dtype=torch.float64)
    shown = replace(
        item,
        groups=[*whole, *(front.group for front in fronts.values())],
        budget=replace(item.budget, tables={name: front.prices for name, front in fronts.items()}),
        curves=Curves(widths, errors),
    )
    found = allocator.widths(shown)
    chosen = {g.name: found[g.name] for g in whole}
    for name, front in fronts.items():
        chosen.update(front.states[found[name]])
    return chosen


def direction_step(group: Group, round_to: int) -> int:
    """Widths inside heads are multiples of this: of 8, which half-precision kernels want.

    Heads too narrow for eight such steps (less than 64 wide) take an eighth of their width. A
    ``round_to`` of more than 1 is taken instead.
    """
    return round_to if round_to > 1 else max(1, min(8, group.units // 8))


@dataclass(frozen=True, eq=False)
class _Front:
    """The states of an attention that no other beats, the cheapest first and the dense one last.

    Attributes:
        group: What stands for the attention: a unit is a step up the states.
        states: Group name to width.
        prices: What each state costs.
        errors: What each state changes.
    """

    group: Group
    states: Sequence[Widths]
    prices: Sequence[float]
    errors: Sequence[float]


def _front(item: AllocationContext, heads: Group, inner: Sequence[Group]) -> _Front:
    groups = [heads, *inner]
    curves = {g.name: curve(item, g) for g in groups}
    steps = [widths_of(heads, item.round_to), *(_widths(g, item.round_to) for g in inner)]
    found = []
    for widths in product(*steps):
        if len({*widths[1:]}) > 1:
            continue  # See the top of the file.
        state = {g.name: width for g, width in zip(groups, widths, strict=True)}
        price = kept_price(item.budget, heads, inner, state)
        found.append((price, float(sum(curves[n][w] for n, w in state.items())), state))
    dense = found.pop()  # The last of each list is the dense width.
    found.sort(key=lambda entry: entry[:2])
    front: list[tuple[float, float, Widths]] = []
    for entry in found:
        if not front or entry[1] < front[-1][1]:
            front.append(entry)
    prices, errors, states = zip(*front, dense, strict=True)
    return _Front(replace(heads, units=len(states) - 1, floor=0), states, prices, errors)


def _widths(group: Group, round_to: int) -> list[int]:
    step = direction_step(group, round_to)
    lowest = min(group.units, -(-group.floor // step) * step)
    return sorted({*range(lowest, group.units, step), group.units})
