from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.schedules.helpers import STEPS, batch, model, refresh

mmengine = pytest.importorskip("mmengine")

from mmengine.hooks import Hook  # noqa: E402
from mmengine.model import BaseModel  # noqa: E402
from mmengine.runner import Runner  # noqa: E402

from ovsprune.schedules.loops.mmengine import ScheduleHook  # noqa: E402

pytestmark = pytest.mark.framework


class Wrapped(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def forward(self, pixels, labels, mode="tensor"):
        return {"loss": nn.functional.cross_entropy(self.inner(pixels), labels)}


class Watch(Hook):
    priority = "LOWEST"

    def __init__(self, hook):
        self.hook, self.trained, self.left = hook, {}, 0

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        plan = self.hook.follower.plan
        self.trained[runner.iter] = plan.trainable
        parameters = dict(plan.model.named_parameters())
        state = runner.optim_wrapper.optimizer.state
        self.left += sum(parameters[name] in state for name in plan.frozen)


def pictures(indices, each):
    parts = [(x, y) for i in indices for x, y in zip(*batch(i), strict=True)]
    return [{"pixels": x, "labels": y} for x, y in parts]


def train(place, name, iterations=STEPS, accumulate=1, make=refresh, **more):
    net, hook = Wrapped(), ScheduleHook(make)
    watch = Watch(hook)
    runner = Runner(
        net,
        str(place),
        train_dataloader={
            "dataset": pictures(range(STEPS), 4),
            "batch_size": 4,
            "sampler": {"type": "InfiniteSampler", "shuffle": False},
            "num_workers": 0,
            "collate_fn": {"type": "default_collate"},
        },
        train_cfg={"by_epoch": False, "max_iters": iterations},
        optim_wrapper={
            "optimizer": {"type": "AdamW", "lr": 0.05, "weight_decay": 0.1},
            "accumulative_counts": accumulate,
        },
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 7, "by_epoch": False}},
        experiment_name=name,
        log_level="ERROR",
        **more,
    )
    runner.register_hook(hook)
    runner.register_hook(watch)
    runner.train()
    return net.state_dict(), watch


def test_the_loop_follows_the_plan_and_resumes_exactly(tmp_path):
    weights, watch = train(tmp_path, "whole")
    assert sorted(watch.trained) == list(range(STEPS))
    assert len(set(watch.trained.values())) > 1 and watch.left == 0
    resumed, again = train(tmp_path, "again", resume=True, load_from=str(tmp_path / "iter_7.pth"))
    # mmengine runs the data on after resuming, and so does the plan
    assert again.trained == {i: watch.trained[i] for i in range(7, STEPS)}
    assert all(torch.equal(value, weights[name]) for name, value in resumed.items())


def test_accumulated_passes_are_one_step(tmp_path):
    _, watch = train(tmp_path, "pairs", accumulate=2)
    assert watch.hook.follower.plan.total_steps == STEPS // 2
    assert watch.hook.follower.plan.moments == (0, 3)
    changes = [i for i in range(1, STEPS) if watch.trained[i] != watch.trained[i - 1]]
    assert changes in ([], [6])


def test_loading_weights_alone_begins_a_new_training(tmp_path):
    """Ignore the plan of a checkpoint of which ``load_from`` reads the weights."""
    train(tmp_path / "first", "first")
    weights = torch.load(tmp_path / "first" / "iter_7.pth", weights_only=False)["state_dict"]
    seen = []

    def make(net, total_steps):
        seen.append(refresh(net, total_steps))
        return seen[-1]

    train(
        tmp_path / "second", "second", load_from=str(tmp_path / "first" / "iter_7.pth"), make=make
    )
    net = model()
    net.load_state_dict({n.removeprefix("inner."): w for n, w in weights.items()})
    found = {name.removeprefix("inner."): alpha for name, alpha in seen[0].alphas.items()}
    assert found == pytest.approx(refresh(net).alphas)
