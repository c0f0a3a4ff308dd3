"""Contract of recoveries: invariants of the towers, and reduction of the error."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from ovsprune.backbones import FAMILIES
from ovsprune.core.records import Plan
from ovsprune.recovery import RECOVERIES, recovery_chain
from tests.contracts.conftest import FAMILY_CASES, Case, case_of, pairs

REPAIRS = [name for name in RECOVERIES.names() if name != "none"]
EVERYWHERE = ("gauss-newton",)
"""Recovery that these tests run for every family by default: the one that a prune uses."""


def recover(case: Case, slim: nn.Module, plan: Plan, name: str, batch_size: int = 5) -> None:
    """Run the recovery called ``name``, and before it what it comes after."""
    for recovery in recovery_chain(name):
        recovery.recover(case.context(slim, plan, batch_size))


def recovered(case: Case, plan: Plan, name: str, batch_size: int = 5) -> nn.Module:
    slim = case.cut(plan)
    recover(case, slim, plan, name, batch_size)
    return slim


@dataclass(frozen=True)
class Recovery:
    """Case and the name of a recovery; recovered towers of random plans are shared."""

    case: Case
    name: str

    def recovered(self, seed: int) -> nn.Module:
        """Return the shared result of :meth:`run`. Tests must not change it."""
        slim: nn.Module = self.case.once(("recovered", self.name, seed), lambda: self.run(seed))
        return slim

    def run(self, seed: int) -> nn.Module:
        """Return the tower cut by ``random_plan(seed)`` and recovered.

        A recovery that comes after another one starts from a copy of that one's shared result.
        """
        plan = self.case.random_plan(seed)
        recovery = RECOVERIES.get(self.name)
        if recovery.after is None:
            slim = self.case.cut(plan)
        else:
            slim = deepcopy(Recovery(self.case, recovery.after).recovered(seed))
        recovery.recover(self.case.context(slim, plan))
        return slim


def recoveries(names: list[str]) -> pytest.MarkDecorator:
    """Run a test with every case and recovery; by default, with a representative selection."""
    return pytest.mark.parametrize("pair", pairs(FAMILY_CASES, names, EVERYWHERE), indirect=True)


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Recovery:
    return Recovery(case_of(request.param[0]), request.param[1])


@recoveries(RECOVERIES.names())
def test_the_dense_tower_is_not_changed(pair: Recovery) -> None:
    """Compared with a copy from before every recovery, those of earlier tests included."""
    case = pair.case
    pair.recovered(0)
    after = case.dense.state_dict()
    assert all(torch.equal(after[k], case.original[k]) for k in case.original)
    assert all(p.grad is None for p in case.dense.parameters())


@recoveries(RECOVERIES.names())
def test_shapes_types_and_modules_do_not_change(pair: Recovery) -> None:
    before = pair.case.cut(pair.case.random_plan(0))
    after = pair.recovered(0)
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


@recoveries(RECOVERIES.names())
def test_a_plan_that_keeps_all_units_changes_no_bit(pair: Recovery) -> None:
    """After ``Family.finish``, the tower equals the original too."""
    case = pair.case
    slim = recovered(case, case.full_plan(), pair.name)
    after, before = slim.state_dict(), case.dense.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    FAMILIES.get(case.backbone.family).finish(slim, case.groups, case.full_plan())
    after, before = slim.state_dict(), case.backbone.tower.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)


@recoveries([n for n in REPAIRS if not RECOVERIES.get(n).trains])
def test_only_consumers_and_producers_of_cut_groups_change(pair: Recovery) -> None:
    """Only the last group is cut, so all layers of other groups stay the same."""
    case = pair.case
    plan = case.full_plan()
    last = case.groups[-1]
    kept = dict(plan.kept) | {last.name: torch.arange(last.units // 2)}
    before, after = case.cut(Plan(kept)), recovered(case, Plan(kept), pair.name)
    touched = {part.module for part in last.slices}
    old = before.state_dict()
    changed = {
        k.rpartition(".")[0] for k, v in after.state_dict().items() if not torch.equal(v, old[k])
    }
    assert changed
    assert changed <= touched


@recoveries(RECOVERIES.names())
def test_recoveries_are_deterministic(pair: Recovery) -> None:
    one, two = pair.recovered(0).state_dict(), pair.run(0).state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)


@recoveries(REPAIRS)
def test_a_recovery_reduces_the_error_on_unseen_images(pair: Recovery) -> None:
    case = pair.case
    plan = case.random_plan(0)
    images = case.images(8)
    wanted = case.outputs(case.dense, images)
    before = (case.outputs(case.cut(plan), images) - wanted).norm()
    after = (case.outputs(pair.recovered(0), images) - wanted).norm()
    # With random weights a bias alone compensates little.
    assert after < (1.0 if pair.name == "bias" else 0.8) * before


@pytest.mark.parametrize(
    "pair",
    pairs(FAMILY_CASES, [n for n in REPAIRS if not RECOVERIES.get(n).trains], ()),
    indirect=True,
)
def test_the_batch_size_does_not_matter_without_training(pair: Recovery) -> None:
    case = pair.case
    plan = case.random_plan(2)
    one, two = (
        case.outputs(recovered(case, plan, pair.name, size), case.images()) for size in (3, 12)
    )
    torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", RECOVERIES.names())
def test_a_chain_ends_with_the_requested_recovery(name: str) -> None:
    chain = recovery_chain(name)
    assert chain[-1] is RECOVERIES.get(name)
    assert chain[0].after is None
    afters = [recovery.after for recovery in chain[1:]]
    assert [RECOVERIES.get(a) for a in afters if a is not None] == chain[:-1]


@recoveries(RECOVERIES.names())
def test_two_images_give_a_finite_recovery_that_is_not_worse(pair: Recovery) -> None:
    """With 2 images there are fewer rows than units."""
    case = pair.case
    few: Case = case.once("two pictures", lambda: case.with_pictures(2))
    plan = case.random_plan(1)
    images = case.images(8)
    wanted = case.outputs(case.dense, images)
    after = case.outputs(Recovery(few, pair.name).recovered(1), images)
    assert after.isfinite().all()
    assert (after - wanted).norm() <= (case.outputs(case.cut(plan), images) - wanted).norm()
