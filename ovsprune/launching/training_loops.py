"""Hooks inside a command that ``ovsprune launch`` started: slim towers, and a schedule.

Towers are replaced by :mod:`ovsprune.launching.session`. This module adds the schedule's
hook to known training loops when they begin to train.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from weakref import WeakSet

from torch import nn

from ovsprune.jobs.schedule import find_pool, schedule
from ovsprune.launching.session import Session, say
from ovsprune.launching.session import watched as towers_watched
from ovsprune.schedules import TrainPlan
from ovsprune.targets.hooks import Hook, put

__all__ = ["LOOPS", "Loop", "told", "watched"]

Make = Callable[..., TrainPlan]


@dataclass(frozen=True)
class Loop:
    """A library's training loop.

    Attributes:
        module: Full name of the module.
        name: Dotted name of a method there that is called before the training begins.
        join: Given the loop and a function that makes a plan; adds the hook of
            :mod:`ovsprune.schedules.loops`.
    """

    module: str
    name: str
    join: Callable[[Any, Make], None]


def _detectron2(trainer: Any, make: Make) -> None:
    from ovsprune.schedules.loops.detectron2 import ScheduleHook

    trainer.register_hooks([ScheduleHook(make)])


def _mmengine(runner: Any, make: Make) -> None:
    from ovsprune.schedules.loops.mmengine import ScheduleHook

    runner.register_hook(ScheduleHook(make))


def _lightning(trainer: Any, make: Make) -> None:
    from ovsprune.schedules.loops.lightning import ScheduleCallback

    trainer.callbacks.append(ScheduleCallback(make))


def _transformers(trainer: Any, make: Make) -> None:
    from ovsprune.schedules.loops.transformers import ScheduleCallback

    trainer.add_callback(ScheduleCallback(make))


LOOPS = (
    # as the trainer's own hooks come, since a resumed training loads their states before it trains
    Loop("detectron2.engine.train_loop", "TrainerBase.register_hooks", _detectron2),
    Loop("mmengine.runner.runner", "Runner.train", _mmengine),
    Loop("lightning.pytorch.trainer.trainer", "Trainer.fit", _lightning),
    Loop("transformers.trainer", "Trainer.train", _transformers),
)
"""Known training loops, one line each; a new one needs a line and a file with its hook."""


def watched(settings: Mapping[str, Any] | None) -> list[str]:
    """Return the patterns of the modules in which functions are wrapped.

    Args:
        settings: Settings of the schedule, or None without one.
    """
    loops = () if settings is None else LOOPS
    return [*towers_watched(), *(loop.module for loop in loops)]


class _Scheduled:
    """Builder of the plan of the model that a loop trains.

    Args:
        settings: Arguments of :func:`ovsprune.schedule`.
        write: Function that writes a record for the parent process.
    """

    def __init__(
        self, settings: Mapping[str, Any], write: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self.settings, self.write = dict(settings), write
        self.joined: WeakSet[Any] = WeakSet()
        self.hooks = tuple(Hook(loop.module, loop.name, self._joining(loop)) for loop in LOOPS)

    def open(self, model: nn.Module) -> None:
        """Enable gradients for the whole pool, so that the framework's optimiser includes it.

        Parameters that the plan leaves alone (``rest="keep"``) are not changed.
        """
        layers, _ = find_pool(model, self.settings["target"], self.settings["pool"])
        wanted = {layer.name for layer in layers}
        if self.settings["rest"] != "keep":
            wanted |= {name for layer in layers for name in layer.followers}
        for name, parameter in model.named_parameters():
            if name in wanted:
                parameter.requires_grad_(True)

    def _joining(self, loop: Loop) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrap(begin: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(begin)
            def begins(trainer: Any, *args: Any, **given: Any) -> Any:
                if trainer not in self.joined:
                    self.joined.add(trainer)
                    loop.join(trainer, self.make)
                return begin(trainer, *args, **given)

            return begins

        return wrap

    def make(self, model: nn.Module, *, total_steps: int) -> TrainPlan:
        """Make the plan of a training that begins."""
        plan = schedule(model, total_steps=total_steps, **self.settings)
        say(f"schedule: {plan!r}")
        self.write(
            {
                "schedule": {
                    "policy": plan.name,
                    "total_steps": total_steps,
                    "trainable": list(plan.trainable),
                    "frozen": list(plan.frozen),
                }
            }
        )
        return plan


@functools.cache
def _hooks(document: str) -> Sequence[Hook]:
    given = json.loads(document)
    session = Session(**given["session"])
    if given["schedule"] is None:
        return session.hooks
    scheduled = _Scheduled(given["schedule"], session.write)
    session.after = scheduled.open
    return (*session.hooks, *scheduled.hooks)


def told(module: ModuleType, document: str) -> None:
    """Wrap the functions of a module that was just imported.

    Args:
        module: A module that a pattern of :func:`watched` matches.
        document: Settings that the parent left in the environment (JSON).
    """
    put(_hooks(document), module)
