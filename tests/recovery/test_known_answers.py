"""Recoveries where the right answer is known, and on towers with massive tokens and channels."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from ovsprune.core.progress import Silent
from ovsprune.core.records import Group, Plan
from ovsprune.jobs.prune import prune
from ovsprune.recovery import RECOVERIES, closed_form_symmetric, pair
from tests.contracts.conftest import Case, open_clip_vit, prepared


@pytest.fixture
def case() -> Case:
    return prepared(open_clip_vit())


def mlp(case: Case, at: int = 0) -> Group:
    return [g for g in case.groups if g.kind == "mlp"][at]


def plan_without(case: Case, group: Group, gone: list[int]) -> Plan:
    kept = dict(case.full_plan().kept)
    kept[group.name] = torch.tensor([u for u in range(group.units) if u not in gone])
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
def test_a_duplicated_unit_is_made_up_for(case: Case, name: str) -> None:
    group = mlp(case)
    first = producer(case, group)
    first.weight[1] = first.weight[0] = first.weight[0] * 20  # Its variance is far above the ridge.
    first.bias[1] = first.bias[0]
    plan = plan_without(case, group, [1])
    images = case.images()
    before = error(case, case.cut(plan), images)
    assert error(case, repaired(case, plan, name), images) < 0.05 * before


@pytest.mark.parametrize("name", ["bias", "closed-form", "closed-form-symmetric", "gauss-newton"])
def test_units_that_are_constant_are_made_up_for_exactly(case: Case, name: str) -> None:
    group = mlp(case)
    first = producer(case, group)
    gone = [0, 3, 7]
    first.weight[gone] = 0.0
    first.bias[gone] = torch.tensor([2.0, 3.0, 4.0])
    plan = plan_without(case, group, gone)
    images = case.images()
    assert error(case, case.cut(plan), images) > 1e-2
    assert error(case, repaired(case, plan, name), images) < 1e-5


def test_bias_changes_biases_alone(case: Case) -> None:
    plan = case.random_plan(0)
    before, after = case.cut(plan).state_dict(), repaired(case, plan, "bias").state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {f"{g.consumer}.bias" for g in case.groups}


@pytest.mark.parametrize("name", ["bias", "closed-form", "closed-form-symmetric", "gauss-newton"])
def test_a_consumer_without_a_bias(case: Case, name: str) -> None:
    """Left as it is by ``bias``, and said so; refitted about zero by the closed forms."""
    group = mlp(case)
    case.dense.get_submodule(group.consumer).bias = None
    plan = plan_without(case, group, list(range(0, group.units, 2)))
    slim, progress, images = case.cut(plan), Silent(), case.images()
    before = error(case, slim, images)
    RECOVERIES.get(name).recover(case.context(slim, plan, progress=progress))
    assert slim.get_submodule(group.consumer).bias is None
    if name == "bias":
        assert progress.notes == [
            f"{group.consumer} has no bias: nothing makes up for what was cut there"
        ]
        assert error(case, slim, images) == before
    else:
        assert error(case, slim, images) < 0.8 * before


def with_outliers() -> Case:
    """A tower as CLIP's are: the class token and two patches a hundred times as long, in a channel.

    The channel is written by the first MLP, so that it is there in every block behind it.
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
    """Relative error of the dense tokens that are no outliers."""
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
    # The symmetric form reads behind norms only, where a massive token is as long as the others;
    # Gauss-Newton finds its way with and without weights.
    ("name", "of_plain"),
    [("closed-form", 0.97), ("closed-form-symmetric", 1.01), ("gauss-newton", 1.01)],
)
def test_massive_tokens_do_not_swallow_the_refit(
    name: str, of_plain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = with_outliers()
    plan = case.random_plan(3)
    before = ordinary_error(case, case.cut(plan))
    weighted = ordinary_error(case, repaired(case, plan, name))
    for module in (pair, closed_form_symmetric):
        monkeypatch.setattr(module, "row_weights", lambda rows, median: torch.ones(rows.shape[:-1]))
    plain = ordinary_error(case, repaired(case, plan, name))
    assert weighted < 0.5 * before
    assert weighted < of_plain * plain


def test_massive_tokens_do_not_swallow_the_choice() -> None:
    """A whole prune of such a tower: the default against a random choice with its own recovery."""
    case = with_outliers()

    def errors(**parts: str) -> list[float]:
        done = (
            prune(case.backbone, 0.5, samples=24, batch_size=8, seed=seed, **parts)
            for seed in range(3)
        )
        return [ordinary_error(case, result.tower) for result in done]

    assert max(errors()) < min(errors(criterion="random", allocation="uniform"))


def test_kept_units_take_over_what_cut_ones_did(case: Case) -> None:
    """Units that are read alike can be one, their sum; the consumer cannot bring that about."""
    group = mlp(case)
    first = producer(case, group)
    consumer = case.dense.get_submodule(group.consumer)
    assert isinstance(consumer, nn.Linear)
    first.bias[:] = 8.0  # Far to the right, where the activation is a straight line.
    plan = plan_without(case, group, list(range(16, group.units)))
    # What the consumer is given lies in 16 directions, as many as there are kept units.
    consumer.weight[:, 16:] = consumer.weight[:, :16].repeat(1, group.units // 16 - 1)
    images = case.images()
    linear, both = (
        error(case, repaired(case, plan, n), images) for n in ("closed-form", "gauss-newton")
    )
    assert both < 0.6 * linear


def test_a_recovery_repeated_finds_nothing_more_to_do_in_the_mean(case: Case) -> None:
    """Between rounds a recovery meets a tower that was repaired before."""
    plan = case.random_plan(0)
    slim = repaired(case, plan, "bias")
    once = deepcopy(slim.state_dict())
    RECOVERIES.get("bias").recover(case.context(slim, plan))
    for name, tensor in slim.state_dict().items():
        torch.testing.assert_close(tensor, once[name], atol=1e-5, rtol=1e-4)


def test_blocks_that_a_training_changed_before_the_first_cut_are_seen(case: Case) -> None:
    group = mlp(case, -1)
    plan = plan_without(case, group, [0])
    slim = case.cut(plan)
    first = slim.get_submodule(mlp(case).consumer)
    with torch.no_grad():
        first.bias[::2] += 0.5  # No unit of this block is gone.
    images = case.images()
    before = error(case, slim, images)
    RECOVERIES.get("closed-form").recover(case.context(slim, plan))
    assert error(case, slim, images) < 0.2 * before
