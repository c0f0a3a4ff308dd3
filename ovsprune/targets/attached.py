"""Attaching of a slim tower to a framework's live model, and detaching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ovsprune.core.errors import TargetError
from ovsprune.slim import SlimCheckpoint
from ovsprune.slim.attach import Applied, Replacements, Swap, undo_on_error
from ovsprune.targets.check import Weights
from ovsprune.targets.layout import Layout
from ovsprune.targets.surgery import Cut, cuts_of, slim_copy

__all__ = ["Attached", "DenseGuard", "add_guard", "attach_cuts", "attach_tower"]


@dataclass(eq=False)
class Attached:
    """Report of an attached slim tower. ``detach`` undoes it; so does the end of a ``with`` block.

    Attributes:
        target: Name of the target.
        slim: Directory of the slim checkpoint.
        weights: ``"slim"`` or ``"target"``.
        reason: Reason for these weights.
        replaced: Path of a module, or name of a tensor, to a description of its replacement.
        kept: Name of a tensor of the framework's tower to the reason why it was kept.
        protected: Canonical name to the reason why the framework needs the part unchanged.
        params_before: Parameters of the whole model before.
        params_after: Parameters of the whole model now.
        macs_before: Multiply-accumulates of the whole model before, for the input in
            ``counted_on``; None if they were not counted.
        macs_after: Multiply-accumulates of the whole model now.
        counted_on: Description of that input, or the reason why nothing was counted.
        notes: Remarks for the report.
        trainable: Patterns (``fnmatch``) of parameters that a schedule may change.
    """

    target: str
    slim: Path
    weights: Weights
    reason: str
    replaced: Mapping[str, str]
    kept: Mapping[str, str]
    protected: Mapping[str, str]
    params_before: int
    params_after: int
    macs_before: int | None = None
    macs_after: int | None = None
    counted_on: str = "not counted"
    trainable: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    _applied: Applied = field(default_factory=Applied, repr=False)
    _guard: Any = field(default=None, repr=False)

    def detach(self) -> None:
        """Restore the original objects; a second call does nothing.

        Raises:
            TargetError: A slim module was replaced by another one since; nothing was undone.
        """
        self._applied.detach()
        # The guard refuses dense checkpoints, which the restored model needs again.
        if self._guard is not None:
            self._guard.remove()
            self._guard = None

    def record(self) -> dict[str, Any]:
        """Return the report as JSON data, with the keys of ``ovsprune transfer --json``."""
        public = {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("_")}
        lists = {"trainable": list(self.trainable), "notes": list(self.notes)}
        return {**public, **lists, "slim": str(self.slim), "dropped": {}, "output": None}

    def __str__(self) -> str:
        """Format the report: costs of the full model, then replaced and protected parts."""
        lines = [
            f"{self.target}: {len(self.replaced)} replaced, weights {self.weights} ({self.reason})"
        ]
        for name, before, after in (
            ("MACs", self.macs_before, self.macs_after),
            ("parameters", self.params_before, self.params_after),
        ):
            if before is not None and after is not None:
                lines.append(f"{name}: {before:,} -> {after:,} ({after / before - 1:+.1%})")
        lines.append(f"MACs counted on: {self.counted_on}")
        lines += self.notes
        for title, table in (("replaced", self.replaced), ("protected", self.protected)):
            lines += [f"{title} {name}: {text}" for name, text in table.items()]
        return "\n".join(lines)

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()


class DenseGuard:
    """Hook that refuses to load a dense checkpoint into a slim model.

    Frameworks load with ``strict=False``, or skip tensors of another shape with a warning. The
    model would then combine norms of the dense checkpoint with slim layers that keep their values.

    Args:
        target: Name of the target, for the message.
        shapes: Name of a tensor of a slim module to its shape.
        tower: Names of all tensors of the tower.
    """

    def __init__(self, target: str, shapes: Mapping[str, tuple[int, ...]], tower: set[str]) -> None:
        self.target, self.shapes, self.tower = target, dict(shapes), tower

    @classmethod
    def of(cls, model: nn.Module, target: str, layout: Layout, cuts: tuple[Cut, ...]) -> DenseGuard:
        """Create the guard of a slim ``model``."""
        state = model.state_dict()
        tower = {name for name in state if layout.canonical(name) is not None}
        shapes = {
            name: tuple(state[name].shape) for name in tower if any(cut.owns(name) for cut in cuts)
        }
        return cls(target, shapes, tower)

    def below(self, path: str) -> DenseGuard:
        """Return the guard of the submodule at ``path`` (``""``, or ends with a dot)."""
        shapes = {n.removeprefix(path): s for n, s in self.shapes.items() if n.startswith(path)}
        tower = {name.removeprefix(path) for name in self.tower if name.startswith(path)}
        return DenseGuard(self.target, shapes, tower)

    def __call__(self, state: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        # The hook sees the whole state dict; prefix is the path of the hooked module.
        loaded = {k[len(prefix) :]: value for k, value in state.items() if k.startswith(prefix)}
        if not self.tower & set(loaded):
            return  # a checkpoint without a tower, for example of an adapter, may be loaded
        for name, shape in self.shapes.items():
            actual = tuple(loaded[name].shape) if name in loaded else None
            if actual != shape:
                problem = (
                    "is missing (detectron2 drops tensors with another shape)"
                    if actual is None
                    else f"has shape {actual}"
                )
                raise TargetError(
                    f"this checkpoint is not of the slim model: {prefix}{name} {problem}, expected "
                    f"{shape}. Convert it first (ovsprune transfer --target {self.target} "
                    "--checkpoint FILE), or load it before attaching"
                )


def attach_tower(
    model: nn.Module,
    checkpoint: SlimCheckpoint,
    layout: Layout,
    choice: tuple[Weights, str],
    *,
    target: str,
    protected: Mapping[str, str],
    trainable: tuple[str, ...],
    compat_fixes: Sequence[Swap],
) -> Attached:
    """Replace the tower of ``model`` by the slim one. The caller has checked that it fits.

    Args:
        model: The framework's model, dense.
        checkpoint: The slim checkpoint.
        layout: Names of the tower's tensors in the framework.
        choice: ``"slim"`` loads the checkpoint's tensors, ``"target"`` cuts the model's own; and
            the reason, for the report.
        target: Name of the target; like ``protected`` and ``trainable``, for the report.
        protected: Parts that the framework needs unchanged.
        trainable: Patterns of parameters that a schedule may change.
        compat_fixes: Further replacements that the model needs, made in the same step.
    """
    before, names = _count_parameters(model), model.state_dict().keys()
    cuts = cuts_of(checkpoint, layout)
    replacements = _slim_copies(model, cuts)  # the model changes at commit, all at once
    replaced = {cut.path: str(cut) for cut in cuts}
    kept: dict[str, str] = {}
    for canonical, tensor in checkpoint.tower().items():
        for name, value in layout.to_framework(canonical, tensor).items():
            if name not in names:  # num_batches_tracked, which some norms lack
                continue
            of_copy = replacements.is_new(name)  # of a slim copy, which is reported as a module
            if canonical in layout.stays:
                kept[name] = layout.stays[canonical]
            elif choice[0] == "target":
                kept |= {} if of_copy else {name: "the framework's own"}
            elif not of_copy and replacements.holds(name, value):
                kept[name] = "equal to the slim tower's"
            elif not replacements.load(name, value):
                raise TargetError(
                    f"{name} does not have the shape {tuple(value.shape)} of the slim tower"
                )
            elif not of_copy:
                replaced[name] = "value of the slim tower"
    applied = replacements.commit(compat_fixes)
    with undo_on_error(applied):
        # Registering the guard can fail; the swap is undone then.
        return Attached(
            target=target,
            slim=checkpoint.path,
            weights=choice[0],
            reason=choice[1],
            replaced=replaced,
            kept=kept,
            protected=dict(protected),
            params_before=before,
            params_after=_count_parameters(model),
            trainable=trainable,
            _applied=applied,
            _guard=add_guard(model, target, layout, cuts),
        )


def _count_parameters(model: nn.Module) -> int:
    """Count the elements of the parameters of ``model``; shared parameters count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def attach_cuts(model: nn.Module, cuts: tuple[Cut, ...]) -> Applied:
    """Replace modules by slim copies. All copies are created before the first replacement."""
    return _slim_copies(model, cuts).commit()


def _slim_copies(model: nn.Module, cuts: tuple[Cut, ...]) -> Replacements:
    """Create the slim copies of the cut modules; ``model`` is not changed yet."""
    replacements = Replacements(model)
    for cut in cuts:
        dense = model.get_submodule(cut.path)
        replacements.modules[cut.path] = (dense, slim_copy(dense, cut))
    return replacements


def add_guard(model: nn.Module, target: str, layout: Layout, cuts: tuple[Cut, ...]) -> Any:
    """Register a :class:`DenseGuard` on ``model``; return the handle of the hook."""
    # public since torch 2.5; before that the same method is private
    register: Any = model._register_load_state_dict_pre_hook
    return register(DenseGuard.of(model, target, layout, cuts))
