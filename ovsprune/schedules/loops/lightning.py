"""Callback for the Lightning trainer."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback
from torch.nn.parallel import DistributedDataParallel

from ovsprune.schedules.loops import PlanFollower, PlanOrFactory

__all__ = ["ScheduleCallback"]


class ScheduleCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Runs a plan in a Lightning trainer: ``Trainer(callbacks=[ScheduleCallback(plan)])``.

    Args:
        plan: The plan, or a function that makes it from the LightningModule and the trainer's
            ``estimated_stepping_batches``.

    Attributes:
        follower: Holds the ``plan`` once the training has begun.
    """

    def __init__(self, plan: PlanOrFactory) -> None:
        self.follower = PlanFollower(plan)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin or resume the plan."""
        steps = max(1, int(trainer.estimated_stepping_batches))
        # A DDP wrapper is passed on to be checked; other strategies need no check.
        wrapped = isinstance(trainer.model, DistributedDataParallel)
        model = trainer.model if wrapped else pl_module
        self.follower.begin(model, steps, *trainer.optimizers)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Apply the plan if this batch begins an optimiser step."""
        # batch_idx begins at 0 in every epoch. Lightning takes a step after the last batch of an
        # epoch, even if the accumulation is not complete.
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.follower.plan.step(trainer.global_step)  # counts optimiser steps, not batches

    def state_dict(self) -> dict[str, Any]:
        """Return the state for Lightning's checkpoints."""
        return self.follower.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state from a checkpoint, before or after the training begins."""
        self.follower.load_state_dict(state_dict)
