"""What every recovery must keep, and what a repair must bring."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from ovsprune.core.records import Plan
from ovsprune.recovery import RECOVERIES, recovery_chain
from tests.contracts.conftest import Case

REPAIRS = [name for name in RECOVERIES.names() if name != "none"]


def recover(case: Case, slim: nn.Module, plan: Plan, name: str, batch_size: int = 5) -> None:
    """Run the recovery called ``name``, and before it what it comes after."""
    for recovery in recovery_chain(name):
        recovery.recover(case.context(slim, plan, batch_size))


def recovered(case: Case, plan: Plan, name: str, batch_size: int = 5) -> nn.Module:
    slim = case.cut(plan)
    recover(case, slim, plan, name, batch_size)
    return slim


@pytest.mark.parametrize("name", RECOVERIES.names())
def test_the_dense_tower_is_left_alone(case: Case, name: str) -> None:
    before = {k: v.clone() for k, v in case.dense.state_dict().items()}
    recovered(case, case.random_plan(0), name)
    after = case.dense.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert all(p.grad is None for p in case.dense.parameters())


@pytest.mark.parametrize("name", RECOVERIES.names())
def test_only_values_change(case: Case, name: str) -> None:
    plan = case.random_plan(0)
    before = case.cut(plan)
    after = deepcopy(before)
    recover(case, after, plan, name)
    assert [(n, type(m)) for n, m in after.named_modules()] == [
        (n, type(m)) for n, m in before.named_modules()
    ]
    shapes = [
        [(k, p.shape, p.dtype, p.requires_grad) for k, p in tower.named_parameters()]
        for tower in (before, after)
    ]
    assert shapes[0] == shapes[1]
    assert all(p.grad is None for p in after.parameters())
    assert not after.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in after.modules())


@pytest.mark.parametrize("name", RECOVERIES.names())
def test_a_plan_that_keeps_everything_changes_no_bit(case: Case, name: str) -> None:
    after = recovered(case, case.full_plan(), name).state_dict()
    before = case.dense.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("name", [n for n in REPAIRS if not RECOVERIES.get(n).trains])
def test_only_consumers_and_producers_of_cut_groups_change_up_to_the_cut(
    case: Case, name: str
) -> None:
    """Only the last group is cut, so every other layer is as it was."""
    plan = case.full_plan()
    last = case.groups[-1]
    kept = dict(plan.kept) | {last.name: torch.arange(last.units // 2)}
    before, after = case.cut(Plan(kept)), recovered(case, Plan(kept), name)
    touched = {part.module for part in last.slices}
    old = before.state_dict()
    changed = {
        k.rpartition(".")[0] for k, v in after.state_dict().items() if not torch.equal(v, old[k])
    }
    assert changed
    assert changed <= touched


@pytest.mark.parametrize("name", RECOVERIES.names())
def test_the_same_again(case: Case, name: str) -> None:
    one, two = (recovered(case, case.random_plan(0), name).state_dict() for _ in range(2))
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("name", REPAIRS)
def test_a_repaired_tower_is_closer_on_pictures_it_never_saw(case: Case, name: str) -> None:
    plan = case.random_plan(0)
    images = case.images(8)
    wanted = case.outputs(case.dense, images)
    before = (case.outputs(case.cut(plan), images) - wanted).norm()
    after = (case.outputs(recovered(case, plan, name), images) - wanted).norm()
    # What one vector a layer can bring on random weights is little; on constant units it is all.
    assert after < (1.0 if name == "bias" else 0.8) * before


@pytest.mark.parametrize("name", [n for n in REPAIRS if not RECOVERIES.get(n).trains])
def test_batches_do_not_matter_without_training(case: Case, name: str) -> None:
    plan = case.random_plan(2)
    one, two = (case.outputs(recovered(case, plan, name, size), case.images()) for size in (3, 12))
    torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", RECOVERIES.names())
def test_a_chain_ends_with_the_recovery_that_was_asked_for(name: str) -> None:
    chain = recovery_chain(name)
    assert chain[-1] is RECOVERIES.get(name)
    assert chain[0].after is None
    afters = [recovery.after for recovery in chain[1:]]
    assert [RECOVERIES.get(a) for a in afters if a is not None] == chain[:-1]


@pytest.mark.parametrize("name", RECOVERIES.names())
def test_two_pictures_are_enough_to_stay_finite_and_no_worse(case: Case, name: str) -> None:
    """2 pictures, more units than rows can tell apart."""
    few = deepcopy(case)
    few.pictures = type(case.pictures)(2, case.backbone.preprocess, 0)
    plan = case.random_plan(1)
    images = case.images(8)
    wanted = case.outputs(case.dense, images)
    after = case.outputs(recovered(few, plan, name), images)
    assert after.isfinite().all()
    assert (after - wanted).norm() <= (case.outputs(case.cut(plan), images) - wanted).norm()
