from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.schedules.helpers import STEPS, batch, model, refresh

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from ovsprune.schedules.loops.transformers import ScheduleCallback  # noqa: E402

pytestmark = pytest.mark.framework


class Wrapped(nn.Module):
    """Model with the interface of the Trainer: it returns the loss first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def forward(self, pixels, labels):
        return {"loss": nn.functional.cross_entropy(self.inner(pixels), labels)}


class Watch(transformers.TrainerCallback):
    """Record the trainable parameters of every step, and optimiser states of frozen ones."""

    def __init__(self, hook):
        self.hook, self.trained, self.left = hook, {}, 0

    def on_step_end(self, args, state, control, optimizer=None, **given):
        plan = self.hook.follower.plan
        self.trained[state.global_step] = plan.trainable
        parameters = dict(plan.model.named_parameters())
        self.left += sum(parameters[name] in optimizer.state for name in plan.frozen)


def pictures():
    images, labels = zip(*(batch(i) for i in range(STEPS)), strict=True)
    images, labels = torch.cat(images), torch.cat(labels)
    return [{"pixels": x, "labels": y} for x, y in zip(images, labels, strict=True)]


def train(place, resume=None, accumulate=1):
    torch.manual_seed(0)
    net = Wrapped()
    arguments = transformers.TrainingArguments(
        output_dir=str(place),
        max_steps=STEPS,
        per_device_train_batch_size=4 // accumulate,
        gradient_accumulation_steps=accumulate,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        save_steps=7,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    hook = ScheduleCallback(refresh)
    watch = Watch(hook)
    callbacks = [hook, watch]
    trainer = transformers.Trainer(net, arguments, train_dataset=pictures(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return net.state_dict(), watch


def test_the_loop_follows_the_plan_and_resumes_exactly(tmp_path):
    weights, watch = train(tmp_path)
    assert sorted(watch.trained) == list(range(1, STEPS + 1))
    assert len(set(watch.trained.values())) > 1 and watch.left == 0
    moved = (tmp_path / "checkpoint-7").rename(tmp_path / "moved")  # and another output, too
    resumed, again = train(tmp_path / "other", resume=str(moved))
    assert again.trained == {i: watch.trained[i] for i in range(8, STEPS + 1)}
    assert all(torch.equal(value, weights[name]) for name, value in resumed.items())


def test_accumulated_passes_are_one_step(tmp_path):
    _, watch = train(tmp_path, accumulate=2)
    assert watch.hook.follower.plan.moments == (0, 3, 6, 9)
    assert sorted(watch.trained) == list(range(1, STEPS + 1)) and watch.left == 0
