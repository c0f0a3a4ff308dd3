"""detectron2: a hook for its trainers."""

from __future__ import annotations

from typing import Any

from detectron2.engine import HookBase

from ovsprune.schedules.loops import Following, Made

__all__ = ["ScheduleHook"]


class ScheduleHook(HookBase):  # type: ignore[misc]
    """Follows a plan in a detectron2 trainer: ``trainer.register_hooks([ScheduleHook(plan)])``.

    With several processes a plan that may change its mind must be open when the trainer wraps the
    model: make the hook first. (``create_ddp_model(..., find_unused_parameters=True)``.)

    Args:
        plan: The plan, or a function that makes it (its length is the trainer's ``max_iter``).

    Attributes:
        following: Holds the ``plan``, once the training has begun.
    """

    def __init__(self, plan: Made) -> None:
        self.following = Following(plan)

    def before_train(self) -> None:
        """Begin, or go on."""
        trainer: Any = self.trainer
        inner = getattr(trainer, "_trainer", trainer)  # DefaultTrainer holds the one that runs
        self.following.begin(inner.model, trainer.max_iter, inner.optimizer)

    def before_step(self) -> None:
        """Follow the plan."""
        self.following.plan.step(self.trainer.iter)

    def state_dict(self) -> dict[str, Any]:
        """What detectron2 writes into its checkpoints."""
        return self.following.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What it gives back before the training begins."""
        self.following.load_state_dict(state)
