"""A plan: which parameters of one model train at which step of one training."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ovsprune.core.errors import ScheduleError
from ovsprune.core.protocols import Layer, Policy, ScheduleContext
from ovsprune.schedules.flops import TrainingFlops, step_flops

__all__ = ["TrainPlan"]

Alphas = Callable[[nn.Module, Sequence[str]], Mapping[str, float]]
"""A model and names of layers, to the power-law exponents of their spectra."""

_VERSION = 1


class TrainPlan:
    """Which parameters of a model train when; made by :func:`ovsprune.schedule`.

    It sets ``requires_grad`` and nothing else of the model::

        plan = ovsprune.schedule(model, policy="alpha", fraction=0.5, total_steps=10_000)
        optimizer = torch.optim.AdamW(plan.groups(lr=1e-4))
        plan.bind(optimizer)
        for i in range(10_000):
            plan.step(i)  # before the forward pass of the i-th optimiser step
            ...

    Args:
        model: The model; one that DistributedDataParallel wraps is looked into.
        layers: The pool.
        others: Names of the parameters that always train (True) or never do (False), whatever the
            policy says; what is named nowhere stays as it is.
        name: Name of the policy.
        policy: The policy.
        fraction: Share of the layers that train, in [0, 1].
        count: How many train, instead of a share.
        total_steps: Optimiser steps of the whole training.
        every: How often the policy may change its mind, in steps.
        seed: For policies that draw.
        alphas: Measures spectra, where the policy needs them.

    Raises:
        ScheduleError: DistributedDataParallel wraps the model in a way that cannot follow the plan.

    Attributes:
        chosen: Names of the layers that train now.
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
        self.moments = tuple(policy.moments(total_steps, every))
        self._others, self._alphas = dict(others), alphas
        self._undo: list[Callable[[], None]] = []
        self._parameters = dict(self.model.named_parameters())
        self._before = {n: p.requires_grad for n, p in self._parameters.items()}
        self._first: Mapping[str, float] | None = None
        self._moment: int | None = None
        self._optimizers: tuple[Any, ...] = ()
        self._openings, self._opened = 0, False
        self.chosen: tuple[str, ...] = ()
        self._go(self.moments[0])
        if isinstance(model, DistributedDataParallel):
            self._check_wrapped(model)

    # What trains

    @property
    def changes(self) -> bool:
        """Whether what trains may change during the training."""
        return len(self.moments) > 1

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of all parameters of the model that train now, in its order."""
        return tuple(n for n, p in self._parameters.items() if p.requires_grad)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of all parameters of the model that are frozen now, in its order."""
        return tuple(n for n, p in self._parameters.items() if not p.requires_grad)

    @property
    def alphas(self) -> Mapping[str, float] | None:
        """Name of a layer to its alpha at the start; None where the policy needs none."""
        return self._first

    def step(self, index: int) -> bool:
        """Make ready for an optimiser step; call it before the step's first forward pass.

        Where gradients are accumulated, that is once for all passes of a step: what is frozen loses
        the gradients that it has.

        Args:
            index: Which step comes, from 0; where a training goes on, the number of those done.

        Returns:
            Whether what trains has changed.

        Raises:
            ScheduleError: ``index`` is below 0, or several processes could not follow.
        """
        if index < 0:
            raise ScheduleError(f"step {index}: steps are counted from 0")
        self._check_processes()
        moment = self.moments[bisect_right(self.moments, index) - 1]
        if moment == self._moment:
            self._forget()  # an optimiser may have been given a state of all by now
            return False
        return self._go(moment)

    def _go(self, moment: int) -> bool:
        """Have the policy choose; whether what trains has changed."""
        before, self._moment = self.chosen, moment
        chosen = set(self.policy.choose(self._context(moment)))
        self._set(tuple(layer.name for layer in self.layers if layer.name in chosen))
        return self.chosen != before

    def _context(self, moment: int) -> ScheduleContext:
        alphas: Mapping[str, float] | None = None
        if self.policy.needs_spectra:
            names = [layer.name for layer in self.layers]
            if self._first is None:
                self._first = dict(self._alphas(self.model, names))
                alphas = self._first
            else:
                alphas = self._alphas(self.model, names) if self.policy.current else self._first
        return ScheduleContext(
            layers=self.layers,
            fraction=self.fraction,
            count=self.count,
            step=moment,
            total_steps=self.total_steps,
            generator=torch.Generator().manual_seed(self.seed),
            alphas=alphas,
        )

    def _set(self, chosen: tuple[str, ...]) -> None:
        """Let these layers train and what follows them, the others not, once nothing is open."""
        self.chosen = chosen
        if self._openings:
            return
        for name, train in self._wanted().items():
            self._parameters[name].requires_grad_(train)
        self._forget()

    def _wanted(self) -> dict[str, bool]:
        """Name of every parameter that the plan decides about to whether it trains."""
        wanted, training = dict(self._others), set(self.chosen)
        for layer in self.layers:
            wanted[layer.name] = layer.name in training
            for name in layer.followers:  # of several layers, where it follows several
                wanted[name] = wanted.get(name, False) or wanted[layer.name]
        return wanted

    def _forget(self) -> None:
        """Leave neither a gradient nor an optimiser's state behind for what the plan freezes."""
        for name in self._wanted():
            parameter = self._parameters[name]
            if not parameter.requires_grad:
                parameter.grad = None
                for optimizer in self._optimizers:
                    optimizer.state.pop(parameter, None)

    # Optimisers

    def bind(self, *optimizers: Any) -> None:
        """Have optimisers lose their state of what the plan freezes, now and later.

        A framework's own optimiser keeps its groups, with its own rates: a frozen parameter has no
        gradient and is passed over.

        Raises:
            ScheduleError: A parameter that will train is in none of them.
        """
        held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
        missing = [n for n in self._ever() if id(self._parameters[n]) not in held]
        if missing:
            raise ScheduleError(
                f"the optimiser lacks {len(missing)} parameters that the policy {self.name} trains "
                f"or may train later, {', '.join(missing[:3])} among them; make it with "
                "plan.groups(...), or let a framework make it inside `with plan.open():`"
            )
        self._optimizers = optimizers
        self._forget()

    def _ever(self) -> tuple[str, ...]:
        """Names of the pool's parameters that train at some time."""
        layers = [x for x in self.layers if self.changes or x.name in self.chosen]
        names = [n for layer in layers for n in (layer.name, *layer.followers)]
        always = [name for name, train in self._others.items() if train]
        return tuple(dict.fromkeys(names + always))

    @contextmanager
    def open(self) -> Iterator[None]:
        """Inside, all that the plan may ever train wants gradients.

        For what looks at ``requires_grad`` once: frameworks that make an optimiser, and
        DistributedDataParallel. Openings may nest; the plan holds again behind the last.
        """
        self.hold()
        try:
            yield
        finally:
            if self._openings == 1:
                self.close()
            self._openings = max(0, self._openings - 1)

    def hold(self) -> None:
        """Open it until :meth:`close`."""
        self._openings += 1
        self._opened = True
        for name in self._ever():
            self._parameters[name].requires_grad_(True)

    def close(self) -> None:
        """End every opening, as a training does that begins."""
        self._openings = 0
        self._set(self.chosen)

    def groups(
        self,
        lr: float,
        *,
        weight_decay: float = 0.0,
        multipliers: Mapping[str, float] | None = None,
    ) -> list[dict[str, Any]]:
        """Groups for an optimiser of ``torch.optim``: everything that trains, now or later.

        Args:
            lr: Learning rate.
            weight_decay: Of weights; parameters of one axis (biases, norms) have none.
            multipliers: ``fnmatch`` pattern of names to a factor of the rate (``{"*clip*": 0.1}``
                for SAN); the first that matches holds.

        Returns:
            ``{"params", "lr", "weight_decay", "names"}`` of each group.
        """
        factors = dict(multipliers or {})
        ever = {*self._ever(), *self.trainable}
        groups: dict[tuple[float, float], dict[str, Any]] = {}
        for name, parameter in self._parameters.items():
            if name not in ever:
                continue
            factor = next((f for p, f in factors.items() if fnmatchcase(name, p)), 1.0)
            key = lr * factor, weight_decay if parameter.ndim > 1 else 0.0
            empty = {"params": [], "lr": key[0], "weight_decay": key[1], "names": []}
            group = groups.setdefault(key, empty)
            group["params"].append(parameter)
            group["names"].append(name)
        return list(groups.values())

    def _check_wrapped(self, wrapped: DistributedDataParallel) -> None:
        """DistributedDataParallel waits for the gradients of all that trained when it wrapped."""
        self.made_late()
        if self._opened and _may_miss_some(wrapped):
            return
        self.release()
        raise ScheduleError(
            "DistributedDataParallel wrapped the model before the plan was made, and waits for the "
            f"gradients of what it saw then. Make the plan first and wrap afterwards; {_REMEDY}"
        )

    def made_late(self) -> None:
        """Say that whatever wraps the model did so before the plan was made, and saw all of it."""
        self._opened = all(self._before[name] for name in self._ever())

    def check_wrapper(self, wrapped: Any) -> None:
        """Look at what wrapped the model, if it was DistributedDataParallel.

        Raises:
            ScheduleError: The plan changes its mind, and it waits for the gradients of all, or
                averages those only of what was not frozen when it wrapped.
        """
        if not (self.changes and isinstance(wrapped, DistributedDataParallel)):
            return
        if not _may_miss_some(wrapped):
            raise ScheduleError(
                f"DistributedDataParallel waits for the gradients of all that it saw; {_REMEDY}"
            )
        seen = int(wrapped._get_ddp_logging_data()["num_parameter_tensors"])  # type: ignore[no-untyped-call]
        wanted = len({*self._ever(), *self.trainable})
        if seen < wanted:
            raise ScheduleError(
                f"DistributedDataParallel wrapped the model while the plan froze it: it averages "
                f"{seen} of the {wanted} parameters that will train; {_REMEDY}"
            )

    def _check_processes(self) -> None:
        """What is frozen when a model is wrapped is averaged over no processes when it thaws."""
        if self.changes and not self._opened and _processes() > 1:
            raise ScheduleError(
                f"{_processes()} processes train, and what the policy {self.name} lets train later "
                f"would drift apart in them: {_REMEDY}"
            )

    # What it costs

    def training_flops(self, loss: Callable[[], Tensor]) -> TrainingFlops:
        """Count a step, and the whole training.

        What trains at every moment of a training is counted on the way; of a policy that looks at
        weights which are yet to come, what trains now stands for all of it.

        Args:
            loss: Runs the model on one batch, and gives a scalar.

        Raises:
            ScheduleError: ``loss`` gives no scalar.
        """
        before, openings = (self.chosen, self._moment), self._openings
        optimizers, self._optimizers = self._optimizers, ()  # counting loses no state,
        gradients = {p: p.grad for p in self._parameters.values()}  # and no gradient
        try:
            self.close()
            counted = {self.chosen: step_flops(self.model, loss)}
            now, total = counted[self.chosen], None
            if self.changes and not self.policy.current:
                total = 0
                ends = (*self.moments[1:], self.total_steps)
                for moment, end in zip(self.moments, ends, strict=True):
                    self._go(moment)
                    if self.chosen not in counted:
                        counted[self.chosen] = step_flops(self.model, loss)
                    total += counted[self.chosen].step * (end - moment)
        finally:
            self._moment = before[1]
            self._set(before[0])
            for _ in range(openings):
                self.hold()
            self._optimizers = optimizers
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
        return TrainingFlops(now.forward, now.activations, now.weights, self.total_steps, total)

    # Keeping and undoing

    def state_dict(self) -> dict[str, Any]:
        """What a training needs to go on exactly: plain numbers, strings and lists."""
        return {
            "version": _VERSION,
            **self._settings(),
            "moment": self._moment,
            "chosen": list(self.chosen),
            "alphas": None if self._first is None else _plain(self._first),
        }

    def _settings(self) -> dict[str, Any]:
        return {
            "policy": self.name,
            "fraction": self.fraction,
            "count": self.count,
            "total_steps": self.total_steps,
            "every": self.every,
            "seed": self.seed,
            "layers": [layer.name for layer in self.layers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a plan with the same settings was.

        Raises:
            ScheduleError: The state is of other settings, or of another pool.
        """
        if state.get("version") != _VERSION:
            raise ScheduleError(
                f"the state of a plan has version {state.get('version')!r}, expected {_VERSION}"
            )
        for key, mine in self._settings().items():
            theirs = list(state[key]) if key == "layers" else state[key]
            if theirs != mine:
                shown = (
                    f"{len(theirs)} layers in its pool and not these {len(mine)}"
                    if key == "layers"
                    else f"{key} {theirs!r}, and this one {mine!r}"
                )
                raise ScheduleError(
                    f"the plan that is resumed had {shown}; make the plan with the same settings"
                )
        alphas = state["alphas"]
        self._first = alphas and {name: math.inf if a is None else a for name, a in alphas.items()}
        self._moment = state["moment"]
        self._set(tuple(state["chosen"]))

    def release(self) -> None:
        """Let every parameter train or not as before the plan, and undo what was made for it."""
        self._openings = 0
        for name, train in self._before.items():
            self._parameters[name].requires_grad_(train)
        self._optimizers = ()
        while self._undo:
            self._undo.pop()()

    def on_release(self, undo: Callable[[], None]) -> None:
        """Have ``undo`` called once, by :meth:`release`."""
        self._undo.append(undo)

    def __repr__(self) -> str:
        numel = {True: 0, False: 0}
        for parameter in self._parameters.values():
            numel[parameter.requires_grad] += parameter.numel()
        return (
            f"TrainPlan({self.name}: {len(self.chosen)} of {len(self.layers)} layers train, "
            f"{numel[True]:,} of {sum(numel.values()):,} parameters of the model)"
        )


_REMEDY = (
    "for a policy that changes its mind wrap inside `with plan.open():` and with "
    "find_unused_parameters=True (Lightning: strategy='ddp_find_unused_parameters_true')"
)


def _may_miss_some(wrapped: DistributedDataParallel) -> bool:
    return wrapped.find_unused_parameters and not wrapped.static_graph


def _processes() -> int:
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def _plain(alphas: Mapping[str, float]) -> dict[str, float | None]:
    """None for a layer that is too narrow for a fit: JSON has no infinity."""
    return {name: alpha if math.isfinite(alpha) else None for name, alpha in alphas.items()}
