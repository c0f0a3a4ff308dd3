"""Hook in detectron2's trainer, which need not be compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.schedules.helpers import STEPS, batch, loss, model, refresh

pytest.importorskip("detectron2")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import HookBase, SimpleTrainer, hooks

from ovsprune.schedules.loops.detectron2 import ScheduleHook

pytestmark = pytest.mark.upstream


class Wrapped(nn.Module):
    """Model with the interface of the trainers: it returns a dictionary of losses."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def forward(self, index: int) -> dict[str, torch.Tensor]:
        return {"loss": loss(self.inner, index)}


class Trainer(SimpleTrainer):
    """Loader with a fixed batch per step, also after resuming."""

    def run_step(self) -> None:
        losses = sum(self.model(self.iter).values())
        self.optimizer.zero_grad()
        losses.backward()
        self.optimizer.step()


class Watch(HookBase):
    def __init__(self, hook: ScheduleHook) -> None:
        self.hook, self.trained, self.left = hook, {}, 0

    def after_step(self) -> None:
        plan = self.hook.follower.plan
        self.trained[self.trainer.iter] = plan.trainable
        parameters = dict(plan.model.named_parameters())
        state = self.trainer.optimizer.state
        self.left += sum(parameters[name] in state for name in plan.frozen)


def train(place: Path, resume: bool = False) -> tuple[dict[str, torch.Tensor], Watch]:
    net: Any = Wrapped()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.1)
    trainer = Trainer(net, [batch(0)], optimizer)
    hook = ScheduleHook(refresh)
    watch = Watch(hook)
    keeper = DetectionCheckpointer(net, str(place), trainer=trainer)
    keeping = hooks.PeriodicCheckpointer(keeper, period=7, file_prefix="kept")
    trainer.register_hooks([hook, watch, keeping])
    start = 0
    if resume:
        keeper.load(str(place / "kept_0000006.pth"))
        start = trainer.iter + 1
    trainer.train(start, STEPS)
    return net.state_dict(), watch


def test_the_loop_follows_the_plan_and_resumes_exactly(tmp_path: Path) -> None:
    weights, watch = train(tmp_path)
    assert sorted(watch.trained) == list(range(STEPS))
    assert len(set(watch.trained.values())) > 1 and watch.left == 0
    resumed, again = train(tmp_path, resume=True)
    assert again.trained == {i: watch.trained[i] for i in range(7, STEPS)}
    assert all(torch.equal(value, weights[name]) for name, value in resumed.items())
