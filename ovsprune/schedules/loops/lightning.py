"""Lightning: a callback for its trainer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback
from torch.nn.parallel import DistributedDataParallel

from ovsprune.schedules.loops import Following, Made

__all__ = ["ScheduleCallback"]


class ScheduleCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Follows a plan in a Lightning trainer: ``Trainer(callbacks=[ScheduleCallback(plan)])``.

    Args:
        plan: The plan, or a function that makes it, of the LightningModule (its length is the
            trainer's estimate of its steps).

    Attributes:
        following: Holds the ``plan``, once the training has begun.
    """

    def __init__(self, plan: Made) -> None:
        self.following = Following(plan)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin, or go on."""
        steps = max(1, int(trainer.estimated_stepping_batches))
        wrapped = isinstance(trainer.model, DistributedDataParallel)
        model = trainer.model if wrapped else pl_module
        self.following.begin(model, steps, *trainer.optimizers)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow the plan, when an optimiser step begins."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.following.plan.step(trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """What Lightning writes into its checkpoints."""
        return self.following.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What it gives back, before or after the training begins."""
        self.following.load_state_dict(state_dict)
