from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import ovsprune
from ovsprune.core.errors import OptionError, ScheduleError, UnknownNameError
from ovsprune.schedules.loops import PlanFollower
from tests.schedules.helpers import STEPS, Block, expected, loss, model, refresh


def flags(net: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in net.named_parameters()}


def test_frozen_parameters_do_not_move_and_the_others_do():
    net = model()
    plan = ovsprune.schedule(net, "random", fraction=0.5, seed=3)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.AdamW(plan.groups(lr=0.1, weight_decay=0.1))
    plan.bind(optimizer)
    for i in range(2):
        plan.step(i)
        optimizer.zero_grad()
        loss(net, i).backward()
        optimizer.step()
    moved = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(plan.trainable)
    assert 0 < len(moved) < len(before)
    assert len(plan.chosen) == 7


def test_followers_train_with_their_layer():
    net = model()
    ovsprune.schedule(net, "last-k", count=1)
    assert {n for n, on in flags(net).items() if on} == {"head.weight", "norm.weight", "norm.bias"}
    ovsprune.schedule(net, "first-k", count=2)
    assert {n for n, on in flags(net).items() if on} == {
        "positions", "patch.weight", "patch.bias",
        "blocks.0.norm.weight", "blocks.0.norm.bias",
        "blocks.0.attn.in_proj_weight", "blocks.0.attn.in_proj_bias",
    }  # fmt: skip


class Bottleneck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Parameter(torch.ones(4, 2))
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)


def test_a_batch_norm_follows_the_convolution_before_it_and_a_projection_the_last_layer():
    net = Bottleneck()
    ovsprune.schedule(net, "first-k", count=1)
    assert {n for n, on in flags(net).items() if on} == {"conv1.weight", "bn1.weight", "bn1.bias"}
    ovsprune.schedule(net, "last-k", count=1)
    assert {n for n, on in flags(net).items() if on} == {
        "conv2.weight", "bn2.weight", "bn2.bias", "proj",
    }  # fmt: skip


def test_other_parameters_can_train_freeze_or_keep_their_flag():
    net = model()
    small = [name for name in flags(net) if "norm" in name or "bias" in name or name == "positions"]
    ovsprune.schedule(net, "none", rest="train")
    assert {n for n, on in flags(net).items() if on} == set(small)
    ovsprune.schedule(net, "all", rest="freeze")
    assert {n for n, on in flags(net).items() if not on} == set(small)
    net.norm.weight.requires_grad_(False)
    net.norm.bias.requires_grad_(True)
    ovsprune.schedule(net, "none", rest="keep")
    assert not net.norm.weight.requires_grad and net.norm.bias.requires_grad


def test_a_frozen_prefix_runs_without_a_graph_and_the_middle_keeps_no_gradient():
    net = model()
    plan = ovsprune.schedule(net, "last-k", count=6)  # most of the last block, and the head
    seen = {}
    for i, block in enumerate(net.blocks):
        block.register_forward_hook(lambda _m, _x, out, i=i: seen.__setitem__(i, out.grad_fn))
    loss(net, 0).backward()
    assert seen[0] is None and seen[2] is not None
    assert "blocks.1.down.weight" in plan.chosen and "blocks.1.up.weight" not in plan.chosen

    plan.release()
    plan = ovsprune.schedule(net, "random", seed=1)
    first = next(i for i, layer in enumerate(plan.layers) if layer.name in plan.chosen)
    middle = [x.name for x in plan.layers[first:] if x.name not in plan.chosen]
    assert middle
    loss(net, 0).backward()
    parameters = dict(net.named_parameters())
    assert all(parameters[name].grad is None for name in (*middle, *plan.frozen))
    assert all(parameters[name].grad is not None for name in plan.chosen)


def test_freezing_deletes_gradients_and_optimiser_state():
    net = model()
    plan = refresh(net)
    optimizer = torch.optim.AdamW(plan.groups(lr=0.05))
    plan.bind(optimizer)
    dropped = False
    for i in range(STEPS):
        had = {n for n, p in net.named_parameters() if p in optimizer.state}
        plan.step(i)
        frozen = set(plan.frozen)
        parameters = dict(net.named_parameters())
        assert not any(parameters[name] in optimizer.state for name in frozen)
        assert all(parameters[name].grad is None for name in frozen)
        dropped = dropped or bool(had & frozen)
        loss(net, i).backward()
        optimizer.step()
    assert dropped  # or nothing above could have failed


def test_a_state_restored_after_binding_is_deleted_for_frozen_parameters():
    """Restore the optimiser state of a training of all layers after the plan was bound."""
    whole = model()
    first = torch.optim.AdamW(whole.parameters(), lr=0.05)
    loss(whole, 0).backward()
    first.step()
    net = model()
    plan = ovsprune.schedule(net, "last-k", count=2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    plan.bind(optimizer)
    optimizer.load_state_dict(first.state_dict())
    parameters = dict(net.named_parameters())
    assert any(parameters[name] in optimizer.state for name in plan.frozen)
    plan.step(0)
    assert not any(parameters[name] in optimizer.state for name in plan.frozen)
    assert all(parameters[name] in optimizer.state for name in plan.trainable)


def test_alpha_refresh_uses_current_weights_and_alpha_initial_ones():
    still, moving = model(), model()
    plans = (
        ovsprune.schedule(still, "alpha", total_steps=9, every=3, fit="hill"),
        refresh(moving, 9),
    )
    assert plans[0].chosen == plans[1].chosen
    assert plans[0].moments == (0,) and plans[1].moments == (0, 3, 6)
    frozen = next(n for n in plans[0].frozen if n.endswith("out_proj.weight"))
    for net in (still, moving):
        weight = dict(net.named_parameters())[frozen]
        with torch.no_grad():  # all singular values the same: the lightest tail that there is
            torch.nn.init.orthogonal_(weight)
    assert not plans[0].step(3) and frozen not in plans[0].chosen
    assert plans[1].step(3) and frozen in plans[1].chosen


def test_alpha_progressive_only_adds_layers():
    net = model()
    plan = ovsprune.schedule(
        net, "alpha-progressive", fraction=0.25, total_steps=100, every=10, fit="hill"
    )
    shares = [len(plan.chosen)]
    for i in range(100):
        before = set(plan.chosen)
        changed = plan.step(i)
        assert before <= set(plan.chosen) and changed == (before != set(plan.chosen))
        shares.append(len(plan.chosen))
    assert shares[0] == 4 and shares[-1] == 14 - 1  # 0.25 and 0.25 + 0.75 * 90 / 100 of 14 layers


def test_a_resumed_training_is_exact():
    weights, trained = expected()
    net, seen = model(), []
    plan = refresh(net)
    optimizer = torch.optim.AdamW(plan.groups(lr=0.05, weight_decay=0.1))
    plan.bind(optimizer)
    for i in range(STEPS):
        if i == 7:  # in the middle between two moments
            kept = json.dumps(plan.state_dict())
            saved = {k: v.clone() for k, v in net.state_dict().items()}, optimizer.state_dict()
            net = model(1)
            plan = refresh(net)
            net.load_state_dict(saved[0])
            plan.load_state_dict(json.loads(kept))
            optimizer = torch.optim.AdamW(plan.groups(lr=0.05, weight_decay=0.1))
            plan.bind(optimizer)
            optimizer.load_state_dict(saved[1])
        plan.step(i)
        seen.append(plan.trainable)
        optimizer.zero_grad()
        loss(net, i).backward()
        optimizer.step()
    assert seen == trained and len(set(trained)) > 1
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


def test_a_plan_of_other_settings_is_not_resumed():
    plan = refresh(model())
    with pytest.raises(ScheduleError, match=r"has seed 1, but this plan has 0; make the plan with"):
        plan.load_state_dict(refresh(model(), seed=1).state_dict())
    with pytest.raises(
        ScheduleError, match=r"has 13 layers in its pool, which differ from these 14"
    ):
        plan.load_state_dict(refresh(model(), pool=["blocks.*", "patch.*"]).state_dict())
    with pytest.raises(ScheduleError, match=r"version 2, expected 1"):
        plan.load_state_dict({**plan.state_dict(), "version": 2})


def test_release_restores_every_flag():
    net = model()
    net.head.weight.requires_grad_(False)
    before = flags(net)
    plan = ovsprune.schedule(net, "inverse", fit="hill")
    assert flags(net) != before
    plan.release()
    assert flags(net) == before


def test_groups_hold_all_trainable_parameters_with_multipliers():
    net = model()
    plan = refresh(net)
    groups = plan.groups(lr=1.0, weight_decay=0.5, multipliers={"blocks.*": 0.1})
    held = {name: group for group in groups for name in group["names"]}
    assert set(held) == set(flags(net))  # any of them may train later
    assert held["blocks.1.up.weight"]["lr"] == pytest.approx(0.1)
    assert held["head.weight"]["lr"] == 1.0
    assert held["head.weight"]["weight_decay"] == 0.5
    assert held["blocks.1.up.bias"]["weight_decay"] == 0.0
    still = ovsprune.schedule(net, "last-k", count=1)
    assert {n for g in still.groups(lr=1.0) for n in g["names"]} == set(still.trainable)


def test_an_optimiser_that_lacks_parameters_is_refused_unless_the_plan_was_open():
    net = model()
    plan = refresh(net)
    wanting = [p for p in net.parameters() if p.requires_grad]
    with pytest.raises(ScheduleError, match=r"lacks \d+ parameters .* plan.open\(\)"):
        plan.bind(torch.optim.SGD(wanting, lr=0.1))
    before = flags(net)
    with plan.open():
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    assert flags(net) == before
    plan.bind(optimizer)


def test_open_contexts_nest_and_end_when_the_training_begins():
    net = model()
    plan = refresh(net)
    chosen, closed = plan.chosen, flags(net)
    with plan.open():
        with plan.open():
            assert all(flags(net).values())
        first = PlanFollower(plan)
        assert all(flags(net).values())
    assert all(flags(net).values())  # the loop holds it open until it begins,
    again = PlanFollower(plan)  # and so does another that is made of the same plan
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    again.begin(net, STEPS, optimizer)
    assert (plan.chosen, flags(net)) == (chosen, closed)
    first.begin(net, STEPS, optimizer)
    assert flags(net) == closed


def test_changes_of_an_open_plan_apply_when_it_closes():
    net = model()
    plan = refresh(net)
    with plan.open():
        net.patch.weight.data.zero_()
        plan.step(3)
        assert all(flags(net).values())
        counted = plan.training_flops(lambda: loss(net, 0))
        assert all(flags(net).values())
    assert counted.step == plan.training_flops(lambda: loss(net, 0)).step
    assert {n for n in plan.chosen if not flags(net)[n]} == set()
    assert {n for n, on in flags(net).items() if on} == set(plan.trainable) != set(flags(net))
    with plan.open():
        plan.release()
    assert all(flags(net).values())


def test_parameters_outside_the_plan_keep_their_state():
    net = model()
    plan = ovsprune.schedule(net, "all", pool=["blocks.1.*"])
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    plan.bind(optimizer)
    loss(net, 0).backward()
    optimizer.step()
    net.head.weight.requires_grad_(False)  # somebody else's doing
    plan.step(0)
    assert net.head.weight in optimizer.state


def test_the_state_is_plain_json_where_a_layer_is_too_narrow_for_a_fit():
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 1))
    plan = ovsprune.schedule(net, "alpha", fit="hill")
    assert plan.alphas["1.weight"] == float("inf")
    state = json.loads(json.dumps(plan.state_dict(), allow_nan=False))
    again = ovsprune.schedule(net, "alpha", fit="hill")
    again.load_state_dict(state)
    assert again.alphas == plan.alphas and again.chosen == plan.chosen


def test_gradients_are_accumulated_over_the_passes_of_a_step():
    nets = model(), model()
    plans = [refresh(net) for net in nets]
    optimizers = [torch.optim.SGD(p.groups(lr=0.5)) for p in plans]
    for i in range(6):
        for net, plan, optimizer, parts in zip(nets, plans, optimizers, (1, 2), strict=True):
            plan.step(i)
            optimizer.zero_grad()
            if parts == 1:
                ((loss(net, 2 * i) + loss(net, 2 * i + 1)) / 2).backward()
            else:
                for part in range(2):
                    (loss(net, 2 * i + part) / 2).backward()
            optimizer.step()
        assert plans[0].chosen == plans[1].chosen
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(a, b)


def test_mixed_precision_with_a_gradient_scaler():
    net = model()
    plan = refresh(net)
    optimizer = torch.optim.AdamW(plan.groups(lr=0.01))
    plan.bind(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    first = set(plan.trainable)
    for i in range(STEPS):
        plan.step(i)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(net, i)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        if i == 2:
            moved = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
            assert moved == first
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert torch.isfinite(loss(net, 0))


def test_the_pool_is_stated_and_can_be_changed():
    net = model()
    plan = ovsprune.schedule(net, "all", pool=["blocks.1.*"])
    assert {layer.name.split(".")[1] for layer in plan.layers} == {"1"}
    assert len(plan.layers) == 4
    assert plan.frozen == ()  # what is outside stays as it is
    with pytest.raises(ScheduleError, match=r"pattern 'block\.\*' of the pool matches none"):
        ovsprune.schedule(net, pool=["block.*"])
    with pytest.raises(ScheduleError, match="no weight of a layer is in the pool"):
        ovsprune.schedule(net, pool=["*norm*"])


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"policy": "alfa"}, UnknownNameError, "Did you mean 'alpha'"),
        ({"fraction": 1.2}, OptionError, r"fraction 1\.2 is outside \[0, 1\]"),
        ({"count": -1}, OptionError, "count -1 must be 0 or more"),
        (
            {"policy": "alpha-refresh"},
            OptionError,
            "alpha-refresh changes its choice .*total_steps",
        ),
        ({"total_steps": 0}, OptionError, "total_steps 0 must be 1 or more"),
        ({"every": 0}, OptionError, "every 0 must be 1 step or more"),
        ({"rest": "drop"}, OptionError, "rest is 'drop', expected one of follow"),
        ({"target": "sam"}, UnknownNameError, "unknown target 'sam'"),
    ],
)
def test_bad_settings_are_refused_and_nothing_is_frozen(given, error, match):
    net = model()
    with pytest.raises(error, match=match):
        ovsprune.schedule(net, **given)
    assert all(flags(net).values())
    with pytest.raises(ScheduleError, match="step -1: steps are counted from 0"):
        ovsprune.schedule(net, "all").step(-1)


def test_the_plan_has_a_readable_repr():
    plan = ovsprune.schedule(Block(8), "none")
    assert repr(plan) == "TrainPlan(none: 0 of 4 layers train, 0 of 584 parameters of the model)"
