"""Training plan: which parameters of one model train at which step of one training."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ovsprune.core.errors import ScheduleError
from ovsprune.core.protocols import Layer, Policy, ScheduleContext
from ovsprune.schedules import ddp, state
from ovsprune.schedules.flags import ParameterFlags, parameter_groups
from ovsprune.schedules.flops import TrainingFlops, step_flops

__all__ = ["TrainPlan"]

Alphas = Callable[[nn.Module, Sequence[str]], Mapping[str, float]]
"""Function of a model and layer names that returns the power-law exponents of their spectra."""


class TrainPlan:
    """Plan of which parameters train at which step; made by :func:`ovsprune.schedule`.

    It sets ``requires_grad`` of the parameters and changes nothing else in the model::

        plan = ovsprune.schedule(model, policy="alpha", fraction=0.5, total_steps=10_000)
        optimizer = torch.optim.AdamW(plan.groups(lr=1e-4))
        plan.bind(optimizer)
        for i in range(10_000):
            plan.step(i)  # before the forward pass of the i-th optimiser step
            ...

    Args:
        model: The model. A DistributedDataParallel wrapper is unwrapped.
        layers: The pool: the layers that the policy decides about.
        others: Names of parameters that always train (True) or never train (False), independent of
            the policy. A parameter that is named nowhere keeps its ``requires_grad``.
        name: Name of the policy.
        policy: The policy.
        fraction: Fraction of the layers that train, in [0, 1].
        count: Number of layers that train; replaces ``fraction``.
        total_steps: Optimiser steps of the whole training.
        every: Interval between two decisions of the policy, in optimiser steps.
        seed: Seed of policies that draw at random.
        alphas: Measures spectra, if the policy needs them.

    Raises:
        ScheduleError: DistributedDataParallel wraps the model in a way that cannot follow the plan.

    Attributes:
        chosen: Names of the layers that train now.
        moments: Steps before which the policy decides, ascending, the first is 0.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        others: Mapping[str, bool],
        name: str,
        policy: Policy,
        *,
        fraction: float,
        count: int | None,
        total_steps: int,
        every: int,
        seed: int,
        alphas: Alphas,
    ) -> None:
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.layers, self.name, self.policy = tuple(layers), name, policy
        self.fraction, self.count, self.total_steps = fraction, count, total_steps
        self.every, self.seed = every, seed
        self.moments = tuple(policy.decision_steps(total_steps, every))
        self.chosen: tuple[str, ...] = ()

        self._flags = ParameterFlags(self.model, self.layers, others)
        self._measure_alphas = alphas
        self._first_alphas: Mapping[str, float] | None = None  # measured at the first decision
        self._undo: list[Callable[[], None]] = []
        self._moment: int | None = None  # step of the decision that holds now
        self._open_count = 0  # nesting depth of open() and hold()
        self._was_opened = False  # True if a wrapper may have registered all parameters

        self._decide(self.moments[0])
        if isinstance(model, DistributedDataParallel):
            self.made_late()
            try:
                ddp.check_wrapped_before(model, self._was_opened)
            except ScheduleError:
                self.release()
                raise

    # Which parameters train

    @property
    def changes(self) -> bool:
        """True if the set of trainable layers may change during the training."""
        return len(self.moments) > 1

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of all parameters of the model that train now, in the order of the model."""
        return self._flags.trainable()

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of all parameters of the model that are frozen now, in the order of the model."""
        return self._flags.trainable(False)

    @property
    def alphas(self) -> Mapping[str, float] | None:
        """Alpha of each layer before training; None if the policy needs no spectra."""
        return self._first_alphas

    def step(self, index: int) -> bool:
        """Prepare an optimiser step; call it before the first forward pass of the step.

        With gradient accumulation, call it once per optimiser step, not once per pass: frozen
        parameters lose the gradients that they hold.

        Args:
            index: Index of the optimiser step, from 0. In a resumed training: the number of
                completed steps.

        Returns:
            True if the set of trainable layers has changed.

        Raises:
            ScheduleError: ``index`` is negative, or several processes train and cannot follow.
        """
        if index < 0:
            raise ScheduleError(f"step {index}: steps are counted from 0")
        if self.changes and not self._was_opened:
            ddp.check_process_count(self.name, ddp.process_count())
        moment = self.moments[bisect_right(self.moments, index) - 1]
        if moment == self._moment:
            self._flags.clear_frozen()  # the optimiser may have loaded a state of all parameters
            return False
        return self._decide(moment)

    def _decide(self, moment: int) -> bool:
        """Apply the choice of the policy at a step; return True if it differs from the last."""
        before, self._moment = self.chosen, moment
        chosen = set(self.policy.choose(self._context(moment)))
        self._apply(tuple(layer.name for layer in self.layers if layer.name in chosen))
        return self.chosen != before

    def _context(self, moment: int) -> ScheduleContext:
        alphas = self._first_alphas
        if self.policy.needs_spectra and (alphas is None or self.policy.needs_current_spectra):
            alphas = self._measure_alphas(self.model, [layer.name for layer in self.layers])
            if self._first_alphas is None:
                alphas = self._first_alphas = dict(alphas)
        return ScheduleContext(
            layers=self.layers,
            fraction=self.fraction,
            count=self.count,
            step=moment,
            total_steps=self.total_steps,
            generator=torch.Generator().manual_seed(self.seed),  # the same at every decision
            alphas=alphas,
        )

    def _apply(self, chosen: tuple[str, ...]) -> None:
        """Set ``requires_grad`` from the chosen layers; wait for the end while the plan is open."""
        self.chosen = chosen
        if not self._open_count:
            self._flags.apply(chosen)

    # Optimisers and wrappers

    def bind(self, *optimizers: Any) -> None:
        """Let optimisers drop their state of frozen parameters, now and at later decisions.

        An optimiser that a framework made keeps its parameter groups and learning rates. It skips
        frozen parameters because they have no gradient.

        Raises:
            ScheduleError: A parameter that will train is in none of the optimisers.
        """
        held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
        missing = [n for n in self._ever_trainable() if id(self._flags.parameters[n]) not in held]
        if missing:
            raise ScheduleError(
                f"the optimiser lacks {len(missing)} parameters that the policy {self.name} trains "
                f"or may train later, for example {', '.join(missing[:3])}; make it with "
                "plan.groups(...), or let the framework make it inside `with plan.open():`"
            )
        self._flags.optimizers = optimizers
        self._flags.clear_frozen()

    def _ever_trainable(self) -> tuple[str, ...]:
        """Return the names of the parameters that the plan trains at some step."""
        pool = [layer.name for layer in self.layers]
        return self._flags.governed(pool if self.changes else self.chosen)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Set ``requires_grad`` of every parameter that may train at some step.

        Use it around code that reads ``requires_grad`` once: frameworks that make an optimiser, and
        DistributedDataParallel. Contexts may be nested; the plan applies again after the outermost.
        """
        self.hold()
        try:
            yield
        finally:
            if self._open_count == 1:  # the outermost; 0 if the block called close()
                self.close()
            self._open_count = max(0, self._open_count - 1)

    def hold(self) -> None:
        """Open the plan until :meth:`close`; see :meth:`open`."""
        self._open_count += 1
        self._was_opened = True
        self._flags.enable(self._ever_trainable())

    def close(self) -> None:
        """End every open context and apply the plan; call it when the training begins."""
        self._open_count = 0
        self._apply(self.chosen)

    def groups(
        self,
        lr: float,
        *,
        weight_decay: float = 0.0,
        multipliers: Mapping[str, float] | None = None,
    ) -> list[dict[str, Any]]:
        """Return parameter groups for a ``torch.optim`` optimiser: all that trains, now or later.

        Args:
            lr: Learning rate.
            weight_decay: Weight decay of weights; parameters with one axis (biases, norms) get 0.
            multipliers: Map of an ``fnmatch`` pattern of names to a factor of the learning rate
                (``{"*clip*": 0.1}`` for SAN). The first pattern that matches is used.

        Returns:
            One dictionary ``{"params", "lr", "weight_decay", "names"}`` per group.
        """
        trained = {*self._ever_trainable(), *self.trainable}
        parameters = {n: p for n, p in self._flags.parameters.items() if n in trained}
        return parameter_groups(parameters, lr, weight_decay, multipliers or {})

    def made_late(self) -> None:
        """Record that the model may have been wrapped before the plan was made.

        Such a wrapper registered every parameter that required gradients then.
        """
        self._was_opened = all(self._flags.original[name] for name in self._ever_trainable())

    def check_wrapper(self, wrapped: Any) -> None:
        """Check the wrapper of the model, if it is DistributedDataParallel.

        Raises:
            ScheduleError: The plan changes during the training, and the wrapper waits for all
                gradients or averages too few of them.
        """
        if self.changes and isinstance(wrapped, DistributedDataParallel):
            ddp.check_averaged(wrapped, len({*self._ever_trainable(), *self.trainable}))

    # Cost

    def training_flops(self, loss: Callable[[], Tensor]) -> TrainingFlops:
        """Count the FLOPs of one step and of the whole training.

        Every set of layers that trains at some step is counted. The choices of a policy that looks
        at later weights are unknown; for such a policy the current choice stands for all steps.

        Args:
            loss: Runs the model on one batch and returns a scalar.

        Raises:
            ScheduleError: ``loss`` does not return a scalar.
        """
        chosen, moment, open_count = self.chosen, self._moment, self._open_count
        with self._flags.preserved():
            try:
                self.close()  # frozen layers must be frozen to be counted
                flops_by_choice = {chosen: step_flops(self.model, loss)}
                total = None
                if self.changes and not self.policy.needs_current_spectra:
                    total = 0
                    ends = (*self.moments[1:], self.total_steps)
                    for start, end in zip(self.moments, ends, strict=True):
                        self._decide(start)
                        if self.chosen not in flops_by_choice:
                            flops_by_choice[self.chosen] = step_flops(self.model, loss)
                        total += flops_by_choice[self.chosen].step * (end - start)
            finally:
                self._moment = moment
                self._apply(chosen)
                for _ in range(open_count):  # close() has ended them
                    self.hold()
        now = flops_by_choice[chosen]
        return TrainingFlops(**vars(now), steps=self.total_steps, known=total)

    # Saving, resuming and undoing

    def state_dict(self) -> dict[str, Any]:
        """Return the state that resumes a training exactly: plain numbers, strings and lists."""
        return {
            "version": state.STATE_VERSION,
            **self._settings(),
            "moment": self._moment,
            "chosen": list(self.chosen),
            "alphas": state.alphas_to_json(self._first_alphas),
        }

    def _settings(self) -> dict[str, Any]:
        names = ("fraction", "count", "total_steps", "every", "seed")
        numbers = {name: getattr(self, name) for name in names}
        return {"policy": self.name, **numbers, "layers": [layer.name for layer in self.layers]}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Resume from the state of a plan with the same settings.

        Raises:
            ScheduleError: The state has other settings or another pool.
        """
        state.check_state(saved, self._settings())
        self._first_alphas = state.alphas_from_json(saved["alphas"])
        self._moment = saved["moment"]
        self._apply(tuple(saved["chosen"]))

    def release(self) -> None:
        """Restore every ``requires_grad`` and undo the changes that were made for the plan."""
        self._open_count = 0
        self._flags.restore()
        while self._undo:
            self._undo.pop()()

    def on_release(self, undo: Callable[[], None]) -> None:
        """Register a function that :meth:`release` calls once."""
        self._undo.append(undo)

    def __repr__(self) -> str:
        numel = {True: 0, False: 0}
        for parameter in self._flags.parameters.values():
            numel[parameter.requires_grad] += parameter.numel()
        return (
            f"TrainPlan({self.name}: {len(self.chosen)} of {len(self.layers)} layers train, "
            f"{numel[True]:,} of {sum(numel.values()):,} parameters of the model)"
        )
