"""Recoveries on a tower with 3x3 convolutions as consumers, with and without a residual."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from ovsprune.core.records import Plan
from ovsprune.graph.cut import cut, mask
from ovsprune.recovery import RECOVERIES
from tests.contracts.conftest import Case
from tests.contracts.conftest import patches as patches  # a fixture
from tests.contracts.test_recoveries import REPAIRS, recovered


@torch.no_grad()
def error(case: Case, slim: nn.Module, images: Tensor) -> float:
    wanted = case.outputs(case.dense, images)
    return float((case.outputs(slim, images) - wanted).norm() / (wanted - wanted.mean()).norm())


def plan_without(case: Case, at: int, removed: list[int]) -> Plan:
    group = case.groups[at]
    kept = dict(case.full_plan().kept)
    kept[group.name] = torch.tensor([u for u in range(group.units) if u not in removed])
    return Plan(kept)


def test_cut_equals_masked(patches: Case) -> None:
    plan = patches.random_plan(0)
    masked = deepcopy(patches.dense)
    mask(masked, patches.groups, plan)
    images = patches.images()
    wanted = patches.outputs(masked, images)
    torch.testing.assert_close(patches.outputs(patches.cut(plan), images), wanted)


@pytest.mark.parametrize("name", RECOVERIES.names())
def test_a_plan_that_keeps_all_units_changes_no_bit(patches: Case, name: str) -> None:
    after = recovered(patches, patches.full_plan(), name).state_dict()
    before = patches.dense.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("name", REPAIRS)
def test_a_recovery_reduces_the_error_on_unseen_images(patches: Case, name: str) -> None:
    plan = patches.random_plan(0)
    images = patches.images(8)
    before = error(patches, patches.cut(plan), images)
    after = error(patches, recovered(patches, plan, name), images)
    assert after < (1.0 if name == "bias" else 0.8) * before


@pytest.mark.parametrize("at", [0, 1])  # with a residual, and without
@pytest.mark.parametrize("name", ["closed-form", "closed-form-symmetric"])
def test_a_removed_duplicate_channel_is_compensated(patches: Case, name: str, at: int) -> None:
    case = deepcopy(patches)
    block = case.dense.get_submodule(case.groups[at].block)
    block.first.weight[1] = block.first.weight[0]
    for tensor in (block.norm.weight, block.norm.bias):
        tensor[:2] = torch.tensor([3.0, 3.0])  # Its variance is far above the ridge.
    plan = plan_without(case, at, [1])
    images = case.images()
    before = error(case, case.cut(plan), images)
    assert error(case, recovered(case, plan, name), images) < 0.05 * before


def test_removed_constant_channels_are_compensated_except_at_the_border(patches: Case) -> None:
    """Zero padding makes a constant channel vary at the border."""
    case = deepcopy(patches)
    block = case.dense.get_submodule(case.groups[0].block)
    block.norm.weight[[0, 3]], block.norm.bias[[0, 3]] = 0.0, 2.0
    plan = plan_without(case, 0, [0, 3])
    images = case.images()
    before = error(case, case.cut(plan), images)
    for name in ("bias", "closed-form"):
        assert error(case, recovered(case, plan, name), images) < 0.5 * before


def test_channelwise_layers_are_not_refitted(patches: Case) -> None:
    plan = patches.random_plan(1)
    before, after = patches.cut(plan), recovered(patches, plan, "closed-form")
    for group in patches.groups:
        for norm in group.norms:
            one, two = (tower.get_submodule(norm).state_dict() for tower in (before, after))
            assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("name", ["bias", "closed-form", "closed-form-symmetric"])
def test_the_batch_size_does_not_matter(patches: Case, name: str) -> None:
    plan = patches.random_plan(2)
    one, two = (
        patches.outputs(recovered(patches, plan, name, size), patches.images()) for size in (3, 12)
    )
    torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)


def test_a_tower_cut_twice_is_repaired_towards_the_dense_tower(patches: Case) -> None:
    """Iterative pruning cuts a tower that was cut and repaired before."""
    first, last = patches.random_plan(0, 0.8), patches.random_plan(0, 0.5)
    slim = recovered(patches, first, "closed-form")
    inner = {name: torch.searchsorted(first.kept[name], kept) for name, kept in last.kept.items()}
    groups = [
        type(g)(
            **{
                **vars(g),
                "units": first.width(g.name),
                "slices": tuple(
                    type(s)(s.module, s.axis, s.rows[: first.width(g.name)]) for s in g.slices
                ),
            }
        )
        for g in patches.groups
    ]
    cut(slim, groups, Plan(inner))
    images = patches.images(8)
    before = error(patches, slim, images)
    RECOVERIES.get("closed-form").recover(patches.context(slim, last))
    assert error(patches, slim, images) < before
