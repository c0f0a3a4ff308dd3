"""Hook for detectron2 trainers."""

from __future__ import annotations

from typing import Any

from detectron2.engine import HookBase

from ovsprune.schedules.loops import PlanFollower, PlanOrFactory

__all__ = ["ScheduleHook"]


class ScheduleHook(HookBase):  # type: ignore[misc]
    """Runs a plan in a detectron2 trainer: ``trainer.register_hooks([ScheduleHook(plan)])``.

    With several processes, a plan that may change during the training must be open when the trainer
    wraps the model: make the hook first, and wrap with
    ``create_ddp_model(..., find_unused_parameters=True)``.

    Args:
        plan: The plan, or a function that makes it from the trainer's ``max_iter``.

    Attributes:
        follower: Holds the ``plan`` once the training has begun.
    """

    def __init__(self, plan: PlanOrFactory) -> None:
        self.follower = PlanFollower(plan)

    def before_train(self) -> None:
        """Begin or resume the plan."""
        trainer: Any = self.trainer
        inner = getattr(trainer, "_trainer", trainer)  # DefaultTrainer wraps a SimpleTrainer
        self.follower.begin(inner.model, trainer.max_iter, inner.optimizer)

    def before_step(self) -> None:
        """Apply the plan to the coming step."""
        self.follower.plan.step(self.trainer.iter)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for detectron2's checkpoints."""
        return self.follower.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state from a checkpoint, before the training begins."""
        self.follower.load_state_dict(state)
