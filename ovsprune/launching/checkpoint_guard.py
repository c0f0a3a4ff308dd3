"""Keeping a slim tower through what its framework does to the model after it was built.

A framework initialises its model or loads a dense checkpoint later on. Then the dense modules step
in, so that every shape is what the framework expects, and afterwards the slim ones, the same
objects (an optimiser may hold them by now), get their values: the slim tower's, or, where the
framework turns out to have tuned its CLIP, its own, cut by the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ovsprune.core.errors import TargetError
from ovsprune.slim import SlimCheckpoint
from ovsprune.targets.attached import Attached, DenseGuard
from ovsprune.targets.check import Weights
from ovsprune.targets.key_map import depth_of
from ovsprune.targets.layout import Layout
from ovsprune.targets.protocol import Target
from ovsprune.targets.surgery import cuts_of, slim_copy

__all__ = ["CheckpointGuard", "DecideWeights", "decide_weights"]

DecideWeights = Callable[[nn.Module], tuple[Weights, str]]
"""Of the dense model: which weights its slim tower gets, and why."""

_ALIKE = 0.5  # cosine of first convolutions; unrelated ones are near 0, tuned ones near 1


def decide_weights(
    target: Target, model: nn.Module, checkpoint: SlimCheckpoint, weights: str, force: bool
) -> tuple[Weights, str]:
    """As the target does; but a tower that is no relative of the base gets the slim weights.

    A framework may build its model without weights and load them later: what it has until then is
    no tower that it tuned.

    Raises:
        TargetError: The model cannot take the slim tower.
    """
    choice = target.check(model, checkpoint, weights=weights, force=force)
    if weights != "auto" or choice[0] == "slim":
        return choice
    layout = target.layout(model.state_dict(), depth_of(checkpoint))
    theirs = layout.tower_state(model.state_dict()).get("conv1.weight")
    ours = checkpoint.tower().get("conv1.weight")
    if theirs is None or ours is None or theirs.shape != ours.shape:
        return choice
    a, b = theirs.detach().flatten().double().cpu(), ours.flatten().double()
    if float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > _ALIKE:
        return choice
    try:
        target.check(model, checkpoint, weights="slim", force=force)
    except TargetError:
        return choice  # it can take the mask alone
    return "slim", "the framework's tower has weights of its own yet to come (it is no relative)"


class CheckpointGuard:
    """Keeps one attached model.

    Args:
        model: The framework's model, with the slim tower attached.
        attached: What attaching gave; nobody may detach it.
        layout: Where the tower's parts are.
        checkpoint: The slim checkpoint.
        decide_weights: Called on the dense model after it was loaded or initialised.
        say: Told what became of the tower.
    """

    def __init__(
        self,
        model: nn.Module,
        attached: Attached,
        layout: Layout,
        checkpoint: SlimCheckpoint,
        decide_weights: DecideWeights,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.attached, self.layout = model, attached, layout
        self.checkpoint, self.decide_weights, self.say = checkpoint, decide_weights, say
        self.cuts = cuts_of(checkpoint, layout)
        self.guard = DenseGuard.of(model, attached.target, layout, self.cuts)
        self.depth = 0
        attached._applied.show_original()
        self.dense_shapes = DenseGuard.of(model, attached.target, layout, self.cuts).shapes
        attached._applied.show_new()
        self._hook()

    def _hook(self) -> None:
        """Take part when a state is loaded, and when the framework initialises the model."""
        if self.attached._guard is not None:  # it refuses dense checkpoints; here they are served
            self.attached._guard.remove()
            self.attached._guard = None
        for path in self._ancestors():
            module: Any = self.model.get_submodule(path)
            load = _Load(self, path)
            # public from torch 2.5 on, private and the same before
            module._register_load_state_dict_pre_hook(load.before)
            module.register_load_state_dict_post_hook(load.after)
            initialise = getattr(module, "init_weights", None)
            if callable(initialise):
                object.__setattr__(module, "init_weights", _Initialise(self, initialise))

    def _ancestors(self) -> list[str]:
        """Paths of the model (``""``) and of every module in it that holds one that is cut."""
        found = {""}
        for cut in self.cuts:
            parts = cut.path.split(".")
            found |= {".".join(parts[:i]) for i in range(1, len(parts))}
        return sorted(found)

    def is_dense(self, state: Mapping[str, Tensor]) -> bool:
        """Whether a state, by the model's names, is of the dense model, at least in part."""
        return any(
            tuple(state[name].shape) == shape != self.guard.shapes.get(name)
            for name, shape in self.dense_shapes.items()
            if name in state
        )

    @contextmanager
    def dense(self, why: str) -> Iterator[None]:
        """The model is dense inside; afterwards slim again, with values from what it was made.

        Args:
            why: What is done to the dense model, for the message.
        """
        self.begin()
        try:
            yield
        finally:
            self.end(why)

    def begin(self) -> None:
        """Have the dense modules step in, unless they did."""
        if not self.depth:
            self.attached._applied.show_original()
        self.depth += 1

    def end(self, why: str) -> None:
        """Have the slim modules step in again once everybody who began has ended."""
        self.depth -= 1
        if self.depth:
            return
        try:
            choice = self.decide_weights(self.model)
            state = self.model.state_dict()
            dense = {name: state[name].clone() for name in self.guard.tower & state.keys()}
            cut = {c.path: slim_copy(self.model.get_submodule(c.path), c) for c in self.cuts}
        finally:
            self.attached._applied.show_new()
        self._fill(choice[0], dense, cut)
        self.attached.weights, self.attached.reason = choice
        self.say(f"{why}: the tower has weights {choice[0]} ({choice[1]})")

    @torch.no_grad()
    def _fill(
        self, weights: str, dense: Mapping[str, Tensor], cut: Mapping[str, nn.Module]
    ) -> None:
        """Write values into the slim tower's tensors, in place."""
        own = self.model.state_dict()
        if weights == "slim":
            values = {
                name: value
                for canonical, tensor in self.checkpoint.tower().items()
                if canonical not in self.layout.stays
                for name, value in self.layout.to_framework(canonical, tensor).items()
            }
        else:
            values = dict(dense)
            for path, module in cut.items():
                values |= {f"{path}.{k}": v for k, v in module.state_dict().items()}
        for name, value in values.items():
            if name in own:  # some norms lack a counter
                own[name].copy_(value)


class _Load:
    """What is done before and after a state is loaded into the model, or into a part of it."""

    def __init__(self, guard: CheckpointGuard, path: str) -> None:
        self.guard, self.path = guard, f"{path}." if path else ""
        self.loading = False

    def before(self, state: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
        """Have the dense modules step in for a dense state; refuse a part of a slim one."""
        if self.guard.depth:
            return
        mine = {
            f"{self.path}{name[len(prefix) :]}": value
            for name, value in state.items()
            if name.startswith(prefix)
        }
        self.loading = self.guard.is_dense(mine)
        if self.loading:
            self.guard.begin()
        else:
            self.guard.guard.below(self.path)(mine, self.path)  # or a mix of two would be left

    def after(self, *rest: Any) -> None:
        """Have the slim modules step in again."""
        if self.loading:
            self.loading = False
            self.guard.end("a dense checkpoint was loaded")


class _Initialise:
    """The ``init_weights`` of the model, or of a part of it, on the dense model."""

    def __init__(self, guard: CheckpointGuard, initialise: Callable[..., Any]) -> None:
        self.guard, self.initialise = guard, initialise

    def __call__(self, *args: Any, **given: Any) -> Any:
        with self.guard.dense("the framework initialised its model"):
            return self.initialise(*args, **given)
