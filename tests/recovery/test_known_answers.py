"""Recoveries with a known solution, and towers with massive tokens and channels."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from ovsprune.core.progress import Silent
from ovsprune.core.records import Group, Plan
from ovsprune.jobs.prune import prune
from ovsprune.recovery import RECOVERIES, dense, pair
from tests.contracts.conftest import Case, open_clip_vit, prepared


@pytest.fixture
def case() -> Case:
    return prepared(open_clip_vit())


def mlp(case: Case, index: int = 0) -> Group:
    return [g for g in case.groups if g.kind == "mlp"][index]


def plan_without(case: Case, group: Group, removed: list[int]) -> Plan:
    kept = dict(case.full_plan().kept)
    kept[group.name] = torch.tensor([u for u in range(group.units) if u not in removed])
    return Plan(kept)


@torch.no_grad()
def error(case: Case, slim: nn.Module, images: Tensor) -> float:
    wanted = case.outputs(case.dense, images)
    return float((case.outputs(slim, images) - wanted).norm() / wanted.norm())


def repaired(case: Case, plan: Plan, name: str) -> nn.Module:
    slim = case.cut(plan)
    RECOVERIES.get(name).recover(case.context(slim, plan))
    return slim


def producer(case: Case, group: Group) -> nn.Linear:
    (name,) = (part.module for part in group.slices if part.axis == "out")
    layer = case.dense.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


@pytest.mark.parametrize("name", ["closed-form", "closed-form-symmetric", "gauss-newton"])
def test_a_removed_duplicate_is_compensated(case: Case, name: str) -> None:
    group = mlp(case)
    first = producer(case, group)
    first.weight[1] = first.weight[0] = first.weight[0] * 20  # Its variance is far above the ridge.
    first.bias[1] = first.bias[0]
    plan = plan_without(case, group, [1])
    images = case.images()
    before = error(case, case.cut(plan), images)
    assert error(case, repaired(case, plan, name), images) < 0.05 * before


@pytest.mark.parametrize("name", ["bias", "closed-form", "closed-form-symmetric", "gauss-newton"])
def test_removed_constant_units_are_compensated_exactly(case: Case, name: str) -> None:
    group = mlp(case)
    first = producer(case, group)
    removed = [0, 3, 7]
    first.weight[removed] = 0.0
    first.bias[removed] = torch.tensor([2.0, 3.0, 4.0])
    plan = plan_without(case, group, removed)
    images = case.images()
    assert error(case, case.cut(plan), images) > 1e-2
    assert error(case, repaired(case, plan, name), images) < 1e-5


def test_bias_changes_only_biases(case: Case) -> None:
    plan = case.random_plan(0)
    before, after = case.cut(plan).state_dict(), repaired(case, plan, "bias").state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {f"{g.consumer}.bias" for g in case.groups}


@pytest.mark.parametrize("name", ["bias", "closed-form", "closed-form-symmetric", "gauss-newton"])
def test_consumers_without_a_bias(case: Case, name: str) -> None:
    """``bias`` leaves them unchanged and adds a note; the closed forms refit the weight only."""
    group = mlp(case)
    case.dense.get_submodule(group.consumer).bias = None
    plan = plan_without(case, group, list(range(0, group.units, 2)))
    slim, progress, images = case.cut(plan), Silent(), case.images()
    before = error(case, slim, images)
    RECOVERIES.get(name).recover(case.context(slim, plan, progress=progress))
    assert slim.get_submodule(group.consumer).bias is None
    if name == "bias":
        assert progress.notes == [
            f"{group.consumer} has no bias, so the cut units are not compensated there"
        ]
        assert error(case, slim, images) == before
    else:
        assert error(case, slim, images) < 0.8 * before


def with_outliers() -> Case:
    """Return a tower with massive tokens in one channel, as CLIP's towers have them.

    The class token and two patch tokens are a hundred times longer than the others. The first MLP
    writes to the channel too, so every later block reads it.
    """
    case = prepared(open_clip_vit(), pictures=24)
    tower = case.backbone.tower
    for one in (tower, case.dense):
        one.class_embedding[5] += 100 * one.class_embedding.std()
        one.positional_embedding[[3, 11], 5] += 100 * one.positional_embedding.std()
        block = one.get_submodule("transformer.resblocks.0")
        block.mlp.c_proj.weight[5] *= 100
    return case


@torch.no_grad()
def ordinary_error(case: Case, slim: nn.Module) -> float:
    """Return the relative error of the dense tokens without the massive ones."""
    images = case.images(16)
    found = []
    for tower in (slim, case.dense):
        stages = case.backbone.stages(tower)
        stream = stages.stem(images)
        for block in stages.blocks.values():
            stream = block(stream)
        tokens = stages.head(stream)[1].flatten(2)
        found.append(tokens[:, :, [i for i in range(tokens.shape[2]) if i not in (2, 10)]])
    return float((found[0] - found[1]).norm() / (found[1] - found[1].mean((0, 2), True)).norm())


@pytest.mark.parametrize(
    # The symmetric form reads after norms, where massive tokens have the usual length.
    # Gauss-Newton reaches the same error with and without weights.
    ("name", "of_plain"),
    [("closed-form", 0.97), ("closed-form-symmetric", 1.01), ("gauss-newton", 1.01)],
)
def test_massive_tokens_do_not_dominate_the_refit(
    name: str, of_plain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = with_outliers()
    plan = case.random_plan(3)
    before = ordinary_error(case, case.cut(plan))
    weighted = ordinary_error(case, repaired(case, plan, name))
    for module in (pair, dense):
        monkeypatch.setattr(module, "row_weights", lambda rows, median: torch.ones(rows.shape[:-1]))
    plain = ordinary_error(case, repaired(case, plan, name))
    assert weighted < 0.5 * before
    assert weighted < of_plain * plain


def test_massive_tokens_do_not_dominate_the_selection() -> None:
    """Compare a default prune of such a tower with a random selection and recovery."""
    case = with_outliers()

    def errors(**parts: str) -> list[float]:
        done = (
            prune(case.backbone, 0.5, samples=24, batch_size=8, seed=seed, **parts)
            for seed in range(3)
        )
        return [ordinary_error(case, result.tower) for result in done]

    assert max(errors()) < min(errors(criterion="random", allocation="uniform"))


def test_kept_units_take_over_the_function_of_cut_units(case: Case) -> None:
    """Units with equal columns can be replaced by their sum; only the producer can compute it."""
    group = mlp(case)
    first = producer(case, group)
    consumer = case.dense.get_submodule(group.consumer)
    assert isinstance(consumer, nn.Linear)
    first.bias[:] = 8.0  # Large inputs, for which the activation is linear.
    plan = plan_without(case, group, list(range(16, group.units)))
    # The columns of the consumer have rank 16, the number of kept units.
    consumer.weight[:, 16:] = consumer.weight[:, :16].repeat(1, group.units // 16 - 1)
    images = case.images()
    linear, both = (
        error(case, repaired(case, plan, n), images) for n in ("closed-form", "gauss-newton")
    )
    assert both < 0.6 * linear


def test_a_second_bias_compensation_changes_nothing(case: Case) -> None:
    """Recover a tower that was repaired before, as in iterative pruning."""
    plan = case.random_plan(0)
    slim = repaired(case, plan, "bias")
    once = deepcopy(slim.state_dict())
    RECOVERIES.get("bias").recover(case.context(slim, plan))
    for name, tensor in slim.state_dict().items():
        torch.testing.assert_close(tensor, once[name], atol=1e-5, rtol=1e-4)


def test_changes_before_the_first_cut_block_are_corrected(case: Case) -> None:
    group = mlp(case, -1)
    plan = plan_without(case, group, [0])
    slim = case.cut(plan)
    first = slim.get_submodule(mlp(case).consumer)
    with torch.no_grad():
        first.bias[::2] += 0.5  # This block was not cut.
    images = case.images()
    before = error(case, slim, images)
    RECOVERIES.get("closed-form").recover(case.context(slim, plan))
    assert error(case, slim, images) < 0.2 * before
