"""Tied heads: which count is taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ovsprune.allocation.tied import tied_widths
from ovsprune.allocation.trim import cost, spare
from ovsprune.core.protocols import AllocationContext, Budget
from ovsprune.core.records import Curves, Group, Scores, Slice


def group(name: str, kind: str, units: int, macs: float) -> Group:
    rows = torch.arange(units)[:, None]
    return Group(name, kind, units, (Slice(name, "in", rows),), name, name, macs=macs, params=macs)


class Fixed:
    """An allocator that wants 2 and 6 heads, and fills the MLPs evenly."""

    needs_curves = False
    needs_spectra = False

    def __init__(self) -> None:
        self.calls: list[AllocationContext] = []

    def widths(self, ctx: AllocationContext) -> dict[str, int]:
        spare(ctx)
        self.calls.append(ctx)
        wanted = {"a.attn": 2, "b.attn": 6}
        heads = {g.name: wanted[g.name] for g in ctx.groups if g.kind == "heads"}
        mlps = [g for g in ctx.groups if g.kind == "mlp"]
        widths = {**heads, **{g.name: 1 for g in mlps}}
        for _ in range(mlps[0].units - 1):
            wider = {**widths, **{g.name: widths[g.name] + 1 for g in mlps}}
            if cost(ctx, wider) > ctx.budget.target:
                break
            widths = wider
        return widths


GROUPS = [
    group("a.attn", "heads", 8, 10.0), group("a.mlp", "mlp", 100, 1.0),
    group("b.attn", "heads", 8, 10.0), group("b.mlp", "mlp", 100, 1.0),
]  # fmt: skip


def ctx(target: float = 200.0) -> AllocationContext:
    return AllocationContext(GROUPS, Scores({}, {}), Budget("macs", 360.0, target), None)


def test_the_mean_count_is_fixed_and_the_rest_gets_what_is_left() -> None:
    allocator = Fixed()
    widths = tied_widths(allocator, ctx())
    assert widths == {"a.attn": 4, "b.attn": 4, "a.mlp": 60, "b.mlp": 60}
    rest = [[g.name for g in call.groups] for call in allocator.calls[1:]]
    assert rest == [["a.mlp", "b.mlp"]] * 3
    # Four heads of eight gone in both: 80 of 360 MACs are no longer there to be cut.
    assert allocator.calls[1].budget.dense == 280.0


@pytest.mark.parametrize(("heads", "mlp", "best"), [(1.0, 0.01, 5), (0.01, 1.0, 3), (0.0, 0.0, 4)])
def test_with_curves_the_neighbour_of_least_error_is_taken(
    heads: float, mlp: float, best: int
) -> None:
    widths = {g.name: torch.arange(1, g.units + 1) for g in GROUPS}
    weight = {"heads": heads, "mlp": mlp}
    errors = {g.name: weight[g.kind] * (1 - widths[g.name] / g.units).double() for g in GROUPS}
    found = tied_widths(Fixed(), replace(ctx(), curves=Curves(widths, errors)))
    assert found["a.attn"] == found["b.attn"] == best


def test_a_count_with_which_the_budget_cannot_be_used_up_is_passed_over() -> None:
    # With 4 heads all MLPs whole cost 280: 20 short of the target; 5 heads make up for it.
    widths = tied_widths(Fixed(), ctx(300.0))
    assert widths["a.attn"] == 5
    assert cost(ctx(300.0), widths) == 300.0


def test_heads_of_other_costs_are_tied_apart() -> None:
    groups = [*GROUPS, replace(group("c.attn", "heads", 8, 20.0))]

    class More(Fixed):
        def widths(self, ctx: AllocationContext) -> dict[str, int]:
            rest = replace(ctx, groups=[g for g in ctx.groups if g.name != "c.attn"])
            found = super().widths(rest)
            return {**found, **{g.name: 7 for g in ctx.groups if g.name == "c.attn"}}

    context = replace(ctx(), groups=groups, budget=Budget("macs", 520.0, 340.0))
    widths = tied_widths(More(), context)
    assert (widths["a.attn"], widths["b.attn"], widths["c.attn"]) == (4, 4, 7)


def test_heads_alone_come_as_close_as_they_can() -> None:
    context = replace(ctx(), groups=[g for g in GROUPS if g.kind == "heads"])
    # 200 of the 360 MACs are MLPs that stay: 5 heads each leave 300.
    widths = tied_widths(FourAndFive(), replace(context, budget=Budget("macs", 360.0, 310.0)))
    assert widths == {"a.attn": 5, "b.attn": 5}


class FourAndFive:
    """Heads as 4 and 5."""

    needs_curves = False
    needs_spectra = False

    def widths(self, ctx: AllocationContext) -> dict[str, int]:
        return {"a.attn": 4, "b.attn": 5}
