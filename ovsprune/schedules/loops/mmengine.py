"""mmengine: a hook for its runner."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict

from ovsprune.schedules.loops import Following, Made

__all__ = ["ScheduleHook"]

_KEY = "ovsprune_plan"


class ScheduleHook(Hook):  # type: ignore[misc]
    """Follows a plan in an mmengine runner: ``runner.register_hook(ScheduleHook(plan))``.

    With several processes a plan that may change its mind must be open when the runner wraps the
    model: make hook, then runner. (``find_unused_parameters=True`` in the configuration.)

    Args:
        plan: The plan, or a function that makes it (its length is the runner's ``max_iters`` over
            the optimiser wrapper's accumulation).

    Attributes:
        following: Holds the ``plan``, once the training has begun.
    """

    priority = "ABOVE_NORMAL"

    def __init__(self, plan: Made) -> None:
        self.following, self._each = Following(plan), 1

    def before_train(self, runner: Any) -> None:
        """Begin, or go on; weights alone (``load_from``) begin a training of their own."""
        if not runner.iter:
            self.following.load_state_dict(None)
        wrapper = runner.optim_wrapper
        wrappers = list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]
        self._each = max(getattr(w, "_accumulative_counts", 1) for w in wrappers)
        steps = -(-runner.max_iters // self._each)
        self.following.begin(runner.model, steps, *(w.optimizer for w in wrappers))

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Follow the plan, when an optimiser step begins."""
        if runner.iter % self._each == 0:
            self.following.plan.step(runner.iter // self._each)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Put the plan's state into mmengine's checkpoint."""
        checkpoint[_KEY] = self.following.state_dict()

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Take it from one; of a training without a plan there is none."""
        self.following.load_state_dict(checkpoint.get(_KEY))
