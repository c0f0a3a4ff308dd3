"""Guard that keeps a tower slim when its framework initialises the model or loads a checkpoint.

For the time of such an operation the dense modules are put back, so that every tensor has the shape
that the framework expects. Afterwards the slim modules return. They are the same objects as before,
because an optimiser may already refer to them. Their values are those of the slim tower, or, if the
framework finetuned CLIP, the framework's own, cut by the mask.
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

__all__ = ["CheckpointGuard", "decide_weights"]

# cosine similarity of patch embeddings: near 0 for unrelated ones, near 1 after finetuning
_RELATED = 0.5


def decide_weights(
    target: Target, model: nn.Module, checkpoint: SlimCheckpoint, weights: str, force: bool
) -> tuple[Weights, str]:
    """Choose the weights like ``target.check``, but use the slim ones for an unrelated tower.

    A framework may build its model with random weights and load CLIP later. Such a tower differs
    from the base model, but it is not a finetuned one. The arguments and errors are those of
    :meth:`ovsprune.targets.Target.check`.
    """
    choice = target.check(model, checkpoint, weights=weights, force=force)
    # An explicit choice of the user is never overruled.
    if weights != "auto" or choice[0] == "slim":
        return choice
    layout = target.layout(model.state_dict(), depth_of(checkpoint))
    current = layout.tower_state(model.state_dict()).get("conv1.weight")
    slim = checkpoint.tower().get("conv1.weight")
    if current is None or slim is None or current.shape != slim.shape:
        return choice
    a, b = current.detach().flatten().double().cpu(), slim.flatten().double()
    if float(torch.nn.functional.cosine_similarity(a, b, dim=0)) > _RELATED:
        return choice
    try:
        target.check(model, checkpoint, weights="slim", force=force)
    except TargetError:
        return choice  # it can use the mask only
    return "slim", "the framework's tower is unrelated to the base: its weights are not loaded yet"


class CheckpointGuard:
    """Guard of one attached model.

    Args:
        model: The framework's model, with the slim tower attached.
        attached: Result of attaching; it must not be detached any more.
        layout: Names of the tower's tensors in the framework.
        checkpoint: The slim checkpoint.
        decide: Receives the dense model after it was loaded or initialised; returns the weights
            that its slim tower gets, and the reason.
        report: Receives a message after every change of the tower.
    """

    def __init__(
        self,
        model: nn.Module,
        attached: Attached,
        layout: Layout,
        checkpoint: SlimCheckpoint,
        *,
        decide: Callable[[nn.Module], tuple[Weights, str]],
        report: Callable[[str], None],
    ) -> None:
        self.model, self.attached, self.layout = model, attached, layout
        self.checkpoint, self.decide, self.report = checkpoint, decide, report
        self.cuts = cuts_of(checkpoint, layout)
        # shapes of the slim modules, and of the dense ones that they replace
        self.dense_guard = DenseGuard.of(model, attached.target, layout, self.cuts)
        self.depth = 0  # operations in progress that need the dense model; they may be nested
        attached._applied.show_original()
        # While the originals are shown, the same call gives the dense shapes.
        self.dense_shapes = DenseGuard.of(model, attached.target, layout, self.cuts).shapes
        attached._applied.show_new()
        self._register_hooks()

    def _register_hooks(self) -> None:
        """Register hooks on loading a state dict and on initialising the model."""
        if self.attached._guard is not None:  # it would refuse dense checkpoints
            self.attached._guard.remove()
            self.attached._guard = None
        for path in self._ancestors():
            module: Any = self.model.get_submodule(path)
            load = _LoadHook(self, path)
            # public since torch 2.5; before that the same method is private
            module._register_load_state_dict_pre_hook(load.before)
            module.register_load_state_dict_post_hook(load.after)
            initialise = getattr(module, "init_weights", None)  # of mmengine's modules
            if callable(initialise):
                object.__setattr__(module, "init_weights", _DenseInitialise(self, initialise))

    def _ancestors(self) -> list[str]:
        """Return the paths of the model (``""``) and of all modules that contain a cut module."""
        # a framework may load or initialise each of them alone
        paths = {""}
        for cut in self.cuts:
            parts = cut.path.split(".")
            paths |= {".".join(parts[:i]) for i in range(1, len(parts))}
        return sorted(paths)

    def is_dense(self, state: Mapping[str, Tensor]) -> bool:
        """Return True if a state dict has a tensor with the shape of the dense model."""
        return any(
            tuple(state[name].shape) == shape != self.dense_guard.shapes.get(name)
            for name, shape in self.dense_shapes.items()
            if name in state
        )

    @contextmanager
    def dense(self, event: str) -> Iterator[None]:
        """Make the model dense in the block; then slim again, with values of the dense model.

        ``event`` describes the change of the dense model, for the message.
        """
        self.begin()
        try:
            yield
        finally:
            self.end(event)

    def begin(self) -> None:
        """Put the dense modules into the model, unless they are there already."""
        if not self.depth:
            self.attached._applied.show_original()
        self.depth += 1

    def end(self, event: str) -> None:
        """Put the slim modules back at the end of the outermost operation."""
        self.depth -= 1
        # An inner operation ends first; only the outermost one knows that loading is complete.
        if self.depth:
            return
        try:
            choice = self.decide(self.model)
            state = self.model.state_dict()
            # copies: the slim model shares the tensors that are not cut
            dense = {name: state[name].clone() for name in self.dense_guard.tower & state.keys()}
            cut = {c.path: slim_copy(self.model.get_submodule(c.path), c) for c in self.cuts}
        finally:
            self.attached._applied.show_new()
        self._fill(choice[0], dense, cut)  # in place: an optimiser may refer to the tensors
        self.attached.weights, self.attached.reason = choice
        self.report(f"{event}: the tower has weights {choice[0]} ({choice[1]})")

    @torch.no_grad()
    def _fill(
        self, weights: str, dense: Mapping[str, Tensor], cut: Mapping[str, nn.Module]
    ) -> None:
        """Write values into the slim tower's tensors, in place."""
        current = self.model.state_dict()
        if weights == "slim":
            values = {
                name: value
                for canonical, tensor in self.checkpoint.tower().items()
                # The framework changed or trains these; a reload must not reset them.
                if canonical not in self.layout.stays
                for name, value in self.layout.to_framework(canonical, tensor).items()
            }
        else:
            values = dict(dense)
            for path, module in cut.items():
                values |= {f"{path}.{k}": v for k, v in module.state_dict().items()}
        for name, value in values.items():
            if name in current:  # some norms lack num_batches_tracked
                current[name].copy_(value)


class _LoadHook:
    """Hooks before and after a state dict is loaded into the model, or into a part of it."""

    def __init__(self, guard: CheckpointGuard, path: str) -> None:
        self.guard, self.path = guard, f"{path}." if path else ""
        self.loading = False

    def before(self, state: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        """Make the model dense for a dense state; refuse an incomplete slim one."""
        if self.guard.depth:  # the hook of a parent has made the model dense
            return
        loaded = {
            f"{self.path}{name[len(prefix) :]}": value
            for name, value in state.items()
            if name.startswith(prefix)
        }
        self.loading = self.guard.is_dense(loaded)
        if self.loading:
            self.guard.begin()
        else:
            # refuses a state that would mix tensors of a dense and a slim model
            self.guard.dense_guard.below(self.path)(loaded, self.path)

    def after(self, *args: Any) -> None:
        """Make the model slim again."""
        if self.loading:
            self.loading = False
            self.guard.end("a dense checkpoint was loaded")


class _DenseInitialise:
    """Replacement of ``init_weights`` that runs it on the dense model."""

    def __init__(self, guard: CheckpointGuard, initialise: Callable[..., Any]) -> None:
        self.guard, self.initialise = guard, initialise

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.guard.dense("the framework initialised its model"):
            return self.initialise(*args, **kwargs)
