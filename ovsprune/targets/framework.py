"""Target that is described by a table.

The file of such a target maps names (:class:`~ovsprune.targets.key_map.KeyMap`) and contains the
lines for a training script. Checks, attaching, detaching and conversion are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ovsprune.slim import SlimCheckpoint
from ovsprune.slim.attach import Applied, Swap, exchange
from ovsprune.targets.attached import Attached, attach_tower
from ovsprune.targets.check import (
    Weights,
    check_activation,
    check_fits,
    check_heads,
    check_trained,
    choose_weights,
)
from ovsprune.targets.convert import Converted, convert_state
from ovsprune.targets.hooks import Hook, install
from ovsprune.targets.key_map import KeyMap, depth_of, kind_of, select_key_map
from ovsprune.targets.layout import Layout
from ovsprune.targets.tower_grad import enable_tower_grad

__all__ = ["Check", "CompatFix", "TableTarget"]

Check = Callable[[nn.Module, SlimCheckpoint, Layout], None]
"""Additional requirement of a framework; raises TargetError and changes nothing."""

CompatFix = Callable[[Any], Sequence[Swap]]
"""Function that lists the replacements that a live model needs to run with current libraries.

The list is empty if the model needs none. The function itself changes nothing."""


@dataclass(frozen=True)
class TableTarget:
    """Target that is described by a table; implements :class:`~ovsprune.targets.Target`.

    Attributes:
        name: Name of the target.
        framework: Name of the framework, with its version or commit.
        key_map: Paths of the tower's parts in the framework.
        takes: Kinds of slim towers that are accepted, of
            :data:`~ovsprune.targets.key_map.KINDS`.
        protects: Canonical name (or description of a part) to the reason why the framework needs
            it unchanged.
        trainable: ``fnmatch`` patterns of the parameters that a schedule may change.
        script: Lines for the training script, with ``{output!r}`` in place of the directory.
        checks: Additional requirements of a live model.
        variants: Key maps of variants of the framework that keep the tower elsewhere. The first
            match of ``key_map`` and ``variants`` is used; without names, ``key_map``.
        compat_fixes: Replacements that let a live model run with current libraries; undone by
            detaching.
        inputs: Function from a model to the arguments of one forward pass over one image, by name.
        prepares: Function that prepares a copy of the model, in place, before its costs are
            counted.
        files: Names of files that accompany the framework's checkpoint.
        obsolete_keys: Pattern of keys that older versions saved, to the reason why they are
            dropped.
        hooks: Functions of the framework that are wrapped so that it runs, by import path.
        no_grad_methods: Dotted paths of the methods in which the framework runs its tower without
            gradients.
        fallback: True if the target is used only for models that no other target recognises.
    """

    name: str
    framework: str
    key_map: KeyMap
    takes: tuple[str, ...]
    protects: Mapping[str, str]
    trainable: tuple[str, ...]
    script: str
    checks: tuple[Check, ...] = ()
    variants: tuple[KeyMap, ...] = ()
    compat_fixes: tuple[CompatFix, ...] = ()
    inputs: Callable[[Any], Mapping[str, Any]] | None = None
    prepares: Callable[[Any], None] | None = None
    files: tuple[str, ...] = ()
    obsolete_keys: Mapping[str, str] = field(default_factory=dict)
    hooks: tuple[Hook, ...] = ()
    no_grad_methods: tuple[str, ...] = ()
    fallback: bool = False

    def detect(self, model: nn.Module) -> bool:
        """Return True if ``model`` has the blocks and the marks of one of the key maps."""
        names = list(model.state_dict())
        return any(not key_map.missing(names) for key_map in (self.key_map, *self.variants))

    def _key_map(self, names: Mapping[str, object] | None, given: str) -> KeyMap:
        """Return the key map that matches ``names``; raise TargetError if none does."""
        if names is None:
            return self.key_map
        return select_key_map((self.key_map, *self.variants), names, given)

    def towers(self, model: nn.Module) -> dict[str, str]:
        """Return the path of each part of the tower; raise TargetError for another framework."""
        names = model.state_dict()
        key_map = self._key_map(names, type(model).__name__)
        stacks, first = {}, 0
        for stack, count in zip(key_map.stacks, key_map.depths(names), strict=True):
            stacks[f"blocks {first}-{first + count - 1}"] = stack.path
            first += count
        return stacks or {part or "tower": str(path) for part, path in key_map.stem.items()}

    def tower_names(self, model: nn.Module) -> frozenset[str]:
        """Return the names of the tower's tensors; raise TargetError for another framework."""
        names = model.state_dict()
        key_map = self._key_map(names, type(model).__name__)
        layout = key_map.layout(names, sum(key_map.depths(names)))
        return frozenset(name for name in names if layout.canonical(name) is not None)

    def layout(self, names: Mapping[str, object] | None, depth: int) -> Layout:
        """Return the names in both directions; without ``names``, those of the default key map."""
        return self._key_map(names, "the checkpoint").layout(names, depth)

    def example(self, model: nn.Module) -> Mapping[str, Any] | None:
        """Return the arguments of one forward pass over one image; None if they are unknown."""
        return None if self.inputs is None else self.inputs(model)

    def prepare(self, model: nn.Module) -> None:
        """Prepare a copy of the framework's model to be run on ``example``, in place."""
        self.apply_compat(model)
        if self.prepares is not None:
            self.prepares(model)

    def apply_compat(self, model: nn.Module) -> Applied:
        """Make the model run with current libraries; ``detach()`` of the result undoes it."""
        return exchange([swap for fix in self.compat_fixes for swap in fix(model)])

    def enable_tower_grad(self, model: nn.Module) -> Applied:
        """Enable gradients in the tower during training; ``detach()`` of the result undoes it."""
        return enable_tower_grad(model, self.no_grad_methods)

    def check(
        self,
        model: nn.Module,
        checkpoint: SlimCheckpoint,
        *,
        weights: str = "auto",
        force: bool = False,
    ) -> tuple[Weights, str]:
        """Check that ``model`` can take the slim tower; return the weights it gets, and why."""
        check_trained(checkpoint, force)
        kind_of(checkpoint, self.takes, self.key_map.framework)
        names = model.state_dict()
        key_map = self._key_map(names, type(model).__name__)
        layout = key_map.layout(names, depth_of(checkpoint))
        check_heads(model, checkpoint, layout)
        state = layout.tower_state(names)
        check_fits(state, checkpoint, layout, f"this {type(model).__name__}")
        check_activation(model, checkpoint, key_map.activations)
        for check in self.checks:
            check(model, checkpoint, layout)
        return choose_weights(weights, state, checkpoint, layout, key_map.mask_only)

    def attach(
        self,
        model: nn.Module,
        checkpoint: SlimCheckpoint,
        *,
        weights: str = "auto",
        force: bool = False,
    ) -> Attached:
        """Replace the tower of ``model`` by the slim one, in place."""
        choice = self.check(model, checkpoint, weights=weights, force=force)
        install(self.hooks)
        compat_fixes = [swap for fix in self.compat_fixes for swap in fix(model)]
        attached = attach_tower(
            model,
            checkpoint,
            self.layout(model.state_dict(), depth_of(checkpoint)),
            choice,
            target=self.name,
            protected=self.protects,
            trainable=self.trainable,
            compat_fixes=compat_fixes,
        )
        attached.notes += tuple(f"adapted to current libraries: {s.path}" for s in compat_fixes)
        return attached

    def convert(
        self,
        state: Mapping[str, Tensor] | None,
        checkpoint: SlimCheckpoint,
        *,
        weights: str = "auto",
        force: bool = False,
    ) -> Converted:
        """Return the framework's state dict with the slim tower in it."""
        check_trained(checkpoint, force)
        kind_of(checkpoint, self.takes, self.key_map.framework)
        key_map = self._key_map(state, "the checkpoint")
        layout = key_map.layout(state, depth_of(checkpoint))
        tower = None if state is None else layout.tower_state(state)
        if tower is not None:
            check_fits(tower, checkpoint, layout, "the checkpoint of the framework")
        choice = choose_weights(weights, tower, checkpoint, layout, key_map.mask_only)
        return convert_state(state, checkpoint, layout, choice, self.obsolete_keys)

    def lines(self, output: str) -> str:
        """Return the lines to add to the framework's training script."""
        return self.script.format(output=output)
