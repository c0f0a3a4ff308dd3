"""mmengine: a hook for its runner."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict

from ovsprune.schedules.loops import Made, plan_for

__all__ = ["ScheduleHook"]

_KEY = "ovsprune_plan"


class ScheduleHook(Hook):  # type: ignore[misc]
    """Follows a plan in an mmengine runner: ``runner.register_hook(ScheduleHook(plan))``.

    Args:
        plan: The plan, or a function that makes it (its length is the runner's ``max_iters`` over
            the optimiser wrapper's accumulation).

    Attributes:
        plan: The plan, once the training has begun.
    """

    priority = "ABOVE_NORMAL"

    def __init__(self, plan: Made) -> None:
        self._made, self._each = plan, 1
        self._state: dict[str, Any] | None = None
        self.plan: Any = None

    def before_train(self, runner: Any) -> None:
        """Make the plan, bind the optimisers, and go on where a resumed training was."""
        wrapper = runner.optim_wrapper
        wrappers = list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]
        self._each = max(getattr(w, "_accumulative_counts", 1) for w in wrappers)
        steps = -(-runner.max_iters // self._each)
        self.plan = plan_for(self._made, runner.model, steps)
        if self._state is not None:
            self.plan.load_state_dict(self._state)
        self.plan.bind(*(w.optimizer for w in wrappers))

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Follow the plan, when an optimiser step begins."""
        if runner.iter % self._each == 0:
            self.plan.step(runner.iter // self._each)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Put the plan's state into mmengine's checkpoint."""
        if self.plan is not None:
            checkpoint[_KEY] = self.plan.state_dict()

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Take it from one; of a training without a plan there is none."""
        self._state = checkpoint.get(_KEY)
