from __future__ import annotations

import pytest
import torch

from tests.schedules.helpers import STEPS, batch, loss, model, refresh

lightning = pytest.importorskip("lightning.pytorch")

from ovsprune.schedules.loops.lightning import ScheduleCallback  # noqa: E402

pytestmark = pytest.mark.framework


class Wrapped(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def training_step(self, given, index):
        return loss(self.inner, index)  # whatever the loader gives after resuming

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05, weight_decay=0.1)


class Watch(lightning.Callback):
    def __init__(self, hook):
        self.hook, self.trained, self.left = hook, {}, 0

    def on_train_batch_end(self, trainer, module, outputs, given, index):
        plan = self.hook.follower.plan
        self.trained[index] = plan.trainable
        parameters = dict(plan.model.named_parameters())
        state = trainer.optimizers[0].state
        self.left += sum(parameters[name] in state for name in plan.frozen)


def train(place, resume=None, accumulate=1, steps=STEPS):
    net, hook = Wrapped(), ScheduleCallback(refresh)
    watch = Watch(hook)
    images = [batch(i) for i in range(STEPS)]
    keep = lightning.callbacks.ModelCheckpoint(place, "{step}", every_n_train_steps=7)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        callbacks=[hook, watch, keep],
        default_root_dir=place,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = torch.utils.data.DataLoader(images, batch_size=None)
    trainer.fit(net, loader, ckpt_path=resume)
    return net.state_dict(), watch


def test_the_loop_follows_the_plan_and_resumes_exactly(tmp_path):
    weights, watch = train(tmp_path)
    assert sorted(watch.trained) == list(range(STEPS))
    assert len(set(watch.trained.values())) > 1 and watch.left == 0
    resumed, again = train(tmp_path, resume=str(tmp_path / "step=7.ckpt"))
    assert again.trained == {i: watch.trained[i] for i in range(7, STEPS)}
    assert all(torch.equal(value, weights[name]) for name, value in resumed.items())


def test_accumulated_passes_are_one_step(tmp_path):
    _, watch = train(tmp_path, accumulate=2, steps=STEPS // 2)
    assert watch.hook.follower.plan.total_steps == STEPS // 2
    changes = [i for i in range(1, STEPS) if watch.trained[i] != watch.trained[i - 1]]
    assert changes in ([], [6]) and watch.hook.follower.plan.moments == (0, 3)
