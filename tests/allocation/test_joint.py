"""Heads and widths chosen together: against every choice there is."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from ovsprune.allocation import ALLOCATIONS
from ovsprune.allocation.curves import curve
from ovsprune.allocation.joint import direction_step, joint_widths
from ovsprune.allocation.trim import cost, widths_of
from ovsprune.core.errors import BudgetError
from ovsprune.core.protocols import AllocationContext, Budget
from ovsprune.core.records import Curves, Group, Scores, Slice

HEADS, WIDTH, PRICE = 4, 16, 3.0  # Price of a channel of queries, keys and values in one head.


def attention(name: str) -> list[Group]:
    rows = torch.arange(HEADS * WIDTH).view(HEADS, WIDTH)
    out = f"{name}.out"

    def group(label: str, kind: str, units: int, macs: float, inside: str | None) -> Group:
        own = rows if inside is None else rows.T
        return Group(
            label, kind, units, (Slice(out, "in", own),), out, name, macs=macs, inside=inside
        )

    return [
        group(name, "heads", HEADS, 2 * PRICE * WIDTH, None),
        group(f"{name}.qk", "qk", WIDTH, PRICE * HEADS, name),
        group(f"{name}.vo", "vo", WIDTH, PRICE * HEADS, name),
    ]


def mlp(name: str, units: int) -> Group:
    part = Slice(name, "in", torch.arange(units)[:, None])
    return Group(name, "mlp", units, (part,), name, name, macs=1.0)


GROUPS = [*attention("a"), mlp("m", 200), *attention("b")]
DENSE = 1000.0


def item(target: float, seed: int, round_to: int = 1) -> AllocationContext:
    generator = torch.Generator().manual_seed(seed)
    widths, errors = {}, {}
    for group in GROUPS:
        gone = torch.linspace(1, 0, group.units + 1, dtype=torch.float64)
        scale, power = torch.rand(2, generator=generator).tolist()
        widths[group.name] = torch.arange(group.units + 1)
        errors[group.name] = (0.1 + scale) * gone ** (1 + 2 * power)
    budget = Budget("macs", DENSE, target)
    return AllocationContext(GROUPS, Scores({}, {}), budget, Curves(widths, errors), round_to)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.35, 0.5, 0.8])
def test_the_budget_is_met_by_the_true_cost(seed: int, share: float) -> None:
    asked = item(share * DENSE, seed)
    found = joint_widths(ALLOCATIONS.get("sensitivity"), asked)
    spent = cost(asked, found)
    assert spent <= share * DENSE + 1e-6
    # A unit of the MLP costs 1: nothing is left over but what none of them can take.
    assert spent >= share * DENSE - 1.0 or found["m"] == 200
    assert spent >= share * DENSE - 10.0
    assert all(found[g.name] % 2 == 0 for g in GROUPS if g.inside)
    assert all(found[f"{name}.qk"] == found[f"{name}.vo"] for name in "ab")


@pytest.mark.parametrize("seed", range(3))
def test_no_choice_of_heads_and_widths_is_better(seed: int) -> None:
    """One attention and one MLP, all choices tried that fused attention takes."""
    asked = item(0.5 * DENSE, seed)
    asked = AllocationContext(GROUPS[:4], asked.scores, asked.budget, asked.curves)
    found = joint_widths(ALLOCATIONS.get("sensitivity"), asked)
    curves = {g.name: curve(asked, g) for g in asked.groups}
    options = [
        widths_of(g, 1) if g.inside is None else range(2, WIDTH + 1, 2) for g in asked.groups
    ]
    best = min(
        sum(float(curves[n][w]) for n, w in widths.items())
        for choice in product(*options)
        if (widths := dict(zip(curves, choice, strict=True)))["a.qk"] == widths["a.vo"]
        and cost(asked, widths) <= asked.budget.target
    )
    ours = sum(float(curves[n][w]) for n, w in found.items())
    assert best <= ours <= best * 1.02 + 1e-9


def test_without_directions_the_allocator_alone_decides() -> None:
    asked = item(0.8 * DENSE, 0)
    plain = [g for g in GROUPS if g.inside is None]
    asked = AllocationContext(plain, asked.scores, asked.budget, asked.curves)
    allocator = ALLOCATIONS.get("sensitivity")
    assert joint_widths(allocator, asked) == allocator.widths(asked)


def test_nearly_everything_kept_costs_nearly_nothing() -> None:
    found = joint_widths(ALLOCATIONS.get("sensitivity"), item(DENSE, 0))
    assert found == {g.name: g.units for g in GROUPS}


def test_what_is_out_of_reach_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"gives at most 0\.9"):
        joint_widths(ALLOCATIONS.get("sensitivity"), item(0.01 * DENSE, 0))


@pytest.mark.parametrize(
    ("units", "round_to", "step"), [(64, 1, 8), (80, 1, 8), (16, 1, 2), (4, 1, 1), (16, 8, 8)]
)
def test_widths_go_in_steps(units: int, round_to: int, step: int) -> None:
    assert direction_step(mlp("x", units), round_to) == step
