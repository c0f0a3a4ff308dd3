"""Training in two processes equals training in one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ovsprune
from ovsprune.core.errors import ScheduleError
from ovsprune.schedules.loops import PlanFollower
from tests.schedules.helpers import STEPS, loss, model, refresh

POLICIES = ("alpha", "alpha-refresh")


def worker(rank: int, place: str, port: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for policy in POLICIES:
        torch.save(together(rank, policy), Path(place) / f"{policy}-{rank}.pt")
    dist.destroy_process_group()


def together(rank: int, policy: str) -> dict[str, Any]:
    """Train in one of two processes; return the weights and the layers chosen at each step."""
    net = model()
    if policy == "alpha-refresh":
        plan = refresh(net)
        with plan.open():
            wrapped = DistributedDataParallel(net, find_unused_parameters=True)
    else:
        plan = ovsprune.schedule(net, policy, fit="hill", total_steps=STEPS)
        wrapped = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(plan.groups(lr=0.2), momentum=0.9)
    plan.bind(optimizer)
    chosen = []
    for i in range(STEPS):
        plan.step(i)
        chosen.append(plan.chosen)
        optimizer.zero_grad()
        loss(wrapped, 2 * i + rank).backward()
        optimizer.step()
    return {"state": net.state_dict(), "chosen": chosen}


def alone(policy: str) -> tuple[dict[str, torch.Tensor], list[tuple[str, ...]]]:
    net, chosen = model(), []
    plan = (
        refresh(net)
        if policy == "alpha-refresh"
        else ovsprune.schedule(net, policy, fit="hill", total_steps=STEPS)
    )
    optimizer = torch.optim.SGD(plan.groups(lr=0.2), momentum=0.9)
    plan.bind(optimizer)
    for i in range(STEPS):
        plan.step(i)
        chosen.append(plan.chosen)
        optimizer.zero_grad()
        ((loss(net, 2 * i) + loss(net, 2 * i + 1)) / 2).backward()
        optimizer.step()
    return net.state_dict(), chosen


def free_port() -> str:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the results of two processes for each policy."""
    place = tmp_path_factory.mktemp("ddp")
    mp.spawn(worker, (str(place), free_port()), nprocs=2)
    return place


@pytest.mark.parametrize("policy", POLICIES)
def test_two_processes_train_as_one_does(policy: str, trained: Path) -> None:
    both = [torch.load(trained / f"{policy}-{rank}.pt", weights_only=True) for rank in range(2)]
    state, chosen = alone(policy)
    assert both[0]["chosen"] == both[1]["chosen"] == chosen
    assert (len(set(chosen)) > 1) == (policy == "alpha-refresh")
    for name, value in state.items():
        assert torch.equal(both[0]["state"][name], both[1]["state"][name])
        torch.testing.assert_close(both[0]["state"][name], value, rtol=1e-4, atol=1e-5)


@pytest.fixture
def group():
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    dist.init_process_group("gloo", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_model_that_was_wrapped_before_is_refused_unless_it_can_follow(group):
    net = model()
    wrapped = DistributedDataParallel(net)
    with pytest.raises(ScheduleError, match="Make the plan first and wrap afterwards"):
        ovsprune.schedule(wrapped, "last-k", count=2)
    assert all(p.requires_grad for p in net.parameters())

    net.head.weight.requires_grad_(False)
    closed: nn.Module = DistributedDataParallel(net, find_unused_parameters=True)
    with pytest.raises(ScheduleError, match="parameters that it registered then"):
        ovsprune.schedule(closed, "last-k", count=2)
    assert not net.head.weight.requires_grad

    net.head.weight.requires_grad_(True)
    able = DistributedDataParallel(net, find_unused_parameters=True)
    plan = ovsprune.schedule(able, "last-k", count=2)
    assert plan.chosen == ("blocks.2.down.weight", "head.weight")


def test_a_wrapper_that_saw_the_frozen_model_is_refused(group):
    """Check the parameters that the wrapper registered, not earlier contexts."""
    net = model()
    plan = refresh(net)
    with plan.open():
        plan.bind(torch.optim.SGD(plan.groups(lr=0.1)))
    closed = DistributedDataParallel(net, find_unused_parameters=True)
    with pytest.raises(ScheduleError, match=r"it averages \d+ of the \d+ parameters"):
        plan.check_wrapper(closed)
    with pytest.raises(ScheduleError, match=r"it averages \d+ of the \d+ parameters"):
        PlanFollower(plan).begin(closed, STEPS)
    with plan.open():
        able = DistributedDataParallel(net, find_unused_parameters=True)
    plan.check_wrapper(able)


def test_several_processes_are_refused_before_the_first_step(monkeypatch):
    monkeypatch.setattr("ovsprune.schedules.ddp.process_count", lambda: 2)
    net = model()
    plan = refresh(net)
    plan.bind(torch.optim.SGD(plan.groups(lr=0.1)))  # before the wrapping, as a plain loop does it
    plan.training_flops(lambda: loss(net, 0))
    with pytest.raises(ScheduleError, match="2 processes train"):
        plan.step(0)
    with plan.open():
        pass
    plan.step(0)
    other = model()
    late = PlanFollower(refresh)  # all of it wanted gradients, and whatever wraps it saw that
    late.begin(other, STEPS, torch.optim.SGD(other.parameters(), lr=0.1))
    late.plan.step(0)
    ovsprune.schedule(model(), "alpha", fit="hill").step(0)  # it never changes
