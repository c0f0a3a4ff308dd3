"""Iterative magnitude pruning of units: ranking, rounds, and checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ovsprune
from ovsprune.baselines import imp_units
from ovsprune.baselines.imp_units import prune_units, remove_smallest, unit_sizes
from ovsprune.core.errors import BudgetError, OptionError
from ovsprune.core.protocols import AllocationContext, Backbone, Budget
from ovsprune.core.records import Group, Scores, Slice
from ovsprune.jobs.prune import prune
from tests.contracts.conftest import open_clip_resnet, open_clip_timm_vit, open_clip_vit

QUICK: dict[str, Any] = {
    "method": "imp", "imp_structured": True, "imp_steps": 1, "samples": 6, "batch_size": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def small() -> Backbone:
    return open_clip_vit()


def group(name: str, units: int, width: int, macs: float, floor: int = 1) -> Group:
    rows = torch.arange(units * width).view(units, width)
    slices = (Slice(f"{name}.0", "out", rows), Slice(f"{name}.1", "in", rows))
    return Group(name, "mlp", units, slices, f"{name}.1", name, macs=macs, min_units=floor)


def context(groups: list[Group], target: float) -> AllocationContext:
    dense = sum(g.macs * g.units for g in groups)
    return AllocationContext(groups, Scores({}, {}), Budget("macs", dense, target), None)


def every(groups: list[Group]) -> dict[str, torch.Tensor]:
    return {g.name: torch.ones(g.units, dtype=torch.bool) for g in groups}


def test_the_size_of_a_unit_is_its_mean_absolute_weight() -> None:
    tower = nn.ModuleDict({"a": nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2)])})
    with torch.no_grad():
        tower["a"][0].weight.copy_(torch.tensor([1.0, -2.0, 3.0, 4.0])[:, None].expand(4, 3))
        tower["a"][1].weight.zero_()
    # two units of two channels: 2 x 3 weights on one side, 2 x 2 zeros on the other
    sizes = unit_sizes(tower, [group("a", 2, 2, 1.0)])["a"]
    torch.testing.assert_close(sizes, torch.tensor([(3 + 6) / 10, (9 + 12) / 10]).double())


def test_each_round_removes_a_tenth_ranked_over_all_groups() -> None:
    groups = [group("a", 10, 1, 1.0), group("b", 10, 1, 1.0)]
    sizes = {"a": torch.arange(10.0) + 5, "b": torch.arange(10.0) * 10 + 5.5}
    kept = every(groups)
    for gone in (2, 2, 2, 1):
        before = sum(int(k.sum()) for k in kept.values())
        kept = remove_smallest(context(groups, 1.0), kept, sizes, sizes)
        assert before - sum(int(k.sum()) for k in kept.values()) == gone
    # 5, 5.5, 6, 7, 8, 9, 10 are the smallest seven
    assert kept["a"].tolist() == [False] * 6 + [True] * 4
    assert kept["b"].tolist() == [False] + [True] * 9


def test_the_last_round_skips_units_that_cost_too_much() -> None:
    groups = [group("a", 10, 1, 7.0), group("b", 30, 1, 1.0)]  # 100 in all
    sizes = {"a": torch.tensor([2.5] + [99.0] * 9), "b": torch.arange(30.0)}
    ctx = context(groups, 94.5)
    kept = remove_smallest(ctx, every(groups), sizes, sizes)
    assert kept["a"].all() and kept["b"].tolist() == [False] * 4 + [True] * 26
    kept = remove_smallest(ctx, kept, sizes, sizes)  # to 95, and one more, which goes below 94.5
    assert kept["a"].all() and kept["b"].tolist() == [False] * 6 + [True] * 24


def test_one_of_the_cheapest_units_is_removed_if_all_cost_too_much() -> None:
    groups = [group("a", 10, 1, 7.0), group("b", 10, 1, 9.0)]
    sizes = {"a": torch.arange(10.0) + 5, "b": torch.arange(10.0)}
    kept = remove_smallest(context(groups, 157.0), every(groups), sizes, sizes)
    assert kept["b"].all() and kept["a"].tolist() == [False] + [True] * 9


def test_removed_units_that_fit_the_budget_are_restored() -> None:
    groups = [group("a", 10, 1, 9.0), group("b", 10, 1, 1.0)]  # 100 in all
    kept = {"a": torch.ones(10).bool(), "b": torch.tensor([True] + [False] * 9)}  # 91 left
    first = {"a": torch.ones(10), "b": torch.tensor([9.0, 8, 1, 2, 3, 7, 4, 5, 6, 0])}
    sizes = {"a": torch.arange(10.0), "b": torch.ones(10)}
    found = remove_smallest(context(groups, 85.5), kept, sizes, first)  # 82, and 3 come back
    assert found["a"].tolist() == [False] + [True] * 9
    assert found["b"].nonzero().flatten().tolist() == [0, 1, 5, 8]


def test_floors_are_kept() -> None:
    groups = [group("a", 4, 1, 1.0, floor=4), group("b", 16, 1, 1.0)]
    sizes = {"a": torch.zeros(4), "b": torch.ones(16)}
    kept = remove_smallest(context(groups, 1.0), every(groups), sizes, sizes)
    assert kept["a"].all() and int(kept["b"].sum()) == 14


@pytest.mark.parametrize("budget", ["macs", "params"])
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_the_ratio_is_reached(small: Backbone, ratio: float, budget: str) -> None:
    result = prune(small, ratio, budget=budget, **QUICK)
    assert abs(result.achieved - ratio) <= 0.01
    record = result.record()
    assert (record["method"], record["criterion"], record["recovery"]) == ("imp", "l1", "none")
    assert "transformer.resblocks.2.attn" not in result.plan.kept  # protected, as ever


def test_the_checkpoint_is_written_and_read(small: Backbone, tmp_path: Path) -> None:
    result = prune(small, 0.4, output=tmp_path / "slim", imp_rewind=True, **QUICK)
    checkpoint = ovsprune.read(tmp_path / "slim")
    state, tower = result.tower.state_dict(), checkpoint.tower()
    assert all(torch.equal(tower[k], state[k]) for k in state)
    made = checkpoint.spec.provenance
    assert made["method"] == "imp" and made["imp_rewind"] is True
    assert made["command"].endswith("--method imp --imp-structured --imp-steps 1 --imp-rewind")


def test_without_training_the_dense_weights_are_cut(small: Backbone) -> None:
    result = prune(small, 0.4, **{**QUICK, "imp_steps": 0})
    dense, slim = small.tower.state_dict(), result.tower.state_dict()
    for name in ("transformer.resblocks.0.mlp", "transformer.resblocks.2.mlp"):
        kept = result.plan.kept[name]
        assert torch.equal(slim[f"{name}.c_fc.weight"], dense[f"{name}.c_fc.weight"][kept])
    assert torch.equal(slim["conv1.weight"], dense["conv1.weight"])


def test_the_same_command_gives_the_same_tensors(small: Backbone) -> None:
    one, two = (prune(small, 0.4, **QUICK) for _ in range(2))
    assert all(torch.equal(one.plan.kept[k], two.plan.kept[k]) for k in one.plan.kept)
    first, second = one.tower.state_dict(), two.tower.state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_the_card_reports_the_training(small: Backbone, tmp_path: Path) -> None:
    for steps, said in ((1, "remaining weights were trained"), (0, "without gradient steps")):
        prune(small, 0.4, output=tmp_path / str(steps), **{**QUICK, "imp_steps": steps})
        assert said in (tmp_path / str(steps) / "README.md").read_text("utf-8")


@pytest.mark.parametrize("make", [open_clip_timm_vit, open_clip_vit, open_clip_resnet])
def test_the_masked_tower_equals_the_cut_tower(
    make: Callable[[], Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that masked biases do not reach a norm between units and consumer."""
    made: list[Any] = []

    def kept(*given: Any) -> Any:
        made.append((prune_units(*given), *given))
        plan, student = made[0][0]
        return plan, deepcopy(student)

    monkeypatch.setattr(imp_units, "prune_units", kept)
    slim = prune(make(), 0.4, **{**QUICK, "imp_steps": 2}).tower
    (_, masked), _, _, _, pictures, stages = made[0][:6]
    images = next(iter(pictures.batches(6)))
    with torch.no_grad():
        for mine, other in zip(
            stages(masked).outputs(images), stages(slim).outputs(images), strict=True
        ):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_out_of_reach(small: Backbone) -> None:
    with pytest.raises(BudgetError, match="out of reach"):
        prune(small, 0.99, **QUICK)
    with pytest.raises(OptionError, match="does not take --round-to"):
        prune(small, 0.5, round_to=8, **QUICK)
