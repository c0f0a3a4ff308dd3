from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ovsprune
from ovsprune.core.errors import ScheduleError
from ovsprune.core.flops import unfused_attention
from ovsprune.schedules.flops import step_flops
from tests.schedules.helpers import loss, model


def by_torch(net, index=0):
    with unfused_attention(), FlopCounterMode(display=False) as counter:
        value = loss(net, index)
        forward = counter.get_total_flops()
        if value.requires_grad:
            value.backward()
    net.zero_grad()
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("policy", ["all", "none", "random", "first-k", "last-k"])
def test_a_step_costs_what_torch_counts(policy):
    net = model()
    plan = ovsprune.schedule(net, policy, fraction=0.3)
    counted = plan.training_flops(lambda: loss(net, 0))
    assert (counted.forward, counted.step) == by_torch(net)
    assert counted.forward > 0 and (counted.weights > 0) == (policy != "none")


def test_the_gradient_of_a_weight_costs_as_much_as_the_product_that_reads_it():
    net = model()
    ovsprune.schedule(net, "last-k", count=1, rest="freeze")
    found = step_flops(net, lambda: loss(net, 0))
    assert (found.weights, found.activations) == (2 * 4 * 16 * 5, 0)  # pictures x in x out
    ovsprune.schedule(net, "first-k", count=1, rest="freeze")
    found = step_flops(net, lambda: loss(net, 0))
    assert found.weights == 2 * 4 * 16 * 16 * (3 * 4 * 4)  # pictures x tokens x out x taps
    assert found.activations > 0


def test_products_without_gradients_have_no_weight_gradient():
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            with torch.no_grad():
                x = self.tower(x)
            return self.head(x)

    net = Apart()
    found = step_flops(net, lambda: net(torch.ones(5, 8)).sum())
    assert (found.weights, found.activations) == (2 * 5 * 8 * 3, 0)


def test_counting_does_not_change_gradients_and_the_plan():
    net = model()
    plan = ovsprune.schedule(
        net, "alpha-progressive", fraction=0.2, total_steps=50, every=10, fit="hill"
    )
    plan.step(20)
    loss(net, 0).backward()
    before = {n: None if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}
    chosen, trainable = plan.chosen, plan.trainable
    plan.training_flops(lambda: loss(net, 0))
    assert (plan.chosen, plan.trainable) == (chosen, trainable)
    for name, parameter in net.named_parameters():
        assert (parameter.grad is None) == (before[name] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, before[name])


def test_the_training_sums_the_steps_of_each_choice():
    net = model()
    plan = ovsprune.schedule(
        net, "alpha-progressive", fraction=0.2, total_steps=25, every=10, fit="hill"
    )
    steps = []
    for moment, many in ((0, 10), (10, 10), (20, 5)):
        plan.step(moment)
        steps.append(step_flops(net, lambda: loss(net, 0)).step * many)
    plan.step(0)
    assert steps[0] < steps[1]
    assert plan.training_flops(lambda: loss(net, 0)).total == sum(steps)
    still = ovsprune.schedule(net, "all", total_steps=7).training_flops(lambda: loss(net, 0))
    assert still.total == 7 * still.step
    assert still.record()["total"] == still.total


def test_a_loss_of_several_numbers_is_refused():
    net = model()
    with pytest.raises(ScheduleError, match="must return a tensor of one number"):
        step_flops(net, lambda: net(torch.zeros(2, 3, 16, 16)))


def test_a_failed_count_does_not_change_the_plan():
    net = model()
    plan = ovsprune.schedule(net, "alpha-refresh", total_steps=9, every=3, fit="hill")
    optimizer = torch.optim.SGD(plan.groups(lr=0.1), momentum=0.9)
    plan.bind(optimizer)
    with plan.open():
        with pytest.raises(ScheduleError):
            plan.training_flops(lambda: torch.ones(2))
        assert all(p.requires_grad for p in net.parameters())
    parameters = dict(net.named_parameters())
    frozen = parameters[plan.frozen[0]]
    optimizer.state[frozen]["momentum_buffer"] = torch.zeros_like(frozen)
    plan.step(0)
    assert frozen not in optimizer.state  # it is bound still
