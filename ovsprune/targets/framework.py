"""Target that is described by a table; checks and changes of a model are the same for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ovsprune.core.errors import TargetError
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
from ovsprune.targets.key_map import KeyMap, depth_of, kind_of
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
    """Implementation of :class:`~ovsprune.targets.Target` by a table.

    The attributes ``framework``, ``takes``, ``protects``, ``trainable``, ``files``, ``hooks`` and
    ``fallback`` are those of the protocol.

    Attributes:
        name: Name of the target.
        key_map: Paths of the tower's parts in the framework.
        script: Lines for the training script, with ``{output!r}`` in place of the directory.
        checks: Additional requirements of a live model.
        variants: Key maps of variants of the framework that keep the tower elsewhere. The first
            match of ``key_map`` and ``variants`` is used; without names, ``key_map``.
        compat_fixes: Replacements that let a live model run with current libraries; undone by
            detaching.
        inputs: Function from a model to the arguments of one forward pass over one image, by name.
        prepares: Function that prepares a copy of the model, in place, before its costs are
            counted.
        obsolete_keys: Pattern of keys that older versions saved, to the reason why they are
            dropped.
        no_grad_methods: Dotted paths of the methods in which the framework runs its tower without
            gradients.
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

    def _select(self, names: Iterable[str], subject: str) -> KeyMap:
        """Return the first key map that ``names`` match; ``subject`` describes the model."""
        # names may be an iterator, and every key map reads it.
        names, key_maps = list(names), (self.key_map, *self.variants)
        for key_map in key_maps:
            if not key_map.missing(names):
                return key_map
        raise TargetError(
            f"{subject} is not {self.key_map.framework}: expected "
            f"{'; or '.join(key_map.expected() for key_map in key_maps)}. "
            "Pass the framework's model (unwrapped: model.module), or another --target "
            "(`ovsprune targets` lists them)"
        )

    def towers(self, model: nn.Module) -> dict[str, str]:
        """Return the path of each stack, or of each part of a tower without stacks."""
        names = model.state_dict()
        key_map = self._select(names, type(model).__name__)
        stacks, first = {}, 0
        for stack, count in zip(key_map.stacks, key_map.depths(names), strict=True):
            stacks[f"blocks {first}-{first + count - 1}"] = stack.path
            first += count
        return stacks or {part or "tower": str(path) for part, path in key_map.stem.items()}

    def tower_names(self, model: nn.Module) -> frozenset[str]:
        """Return the names of the tower's tensors."""
        names = model.state_dict()
        key_map = self._select(names, type(model).__name__)
        # There is no checkpoint here, so the model's own number of blocks is the depth.
        layout = key_map.layout(names, sum(key_map.depths(names)))
        return frozenset(name for name in names if layout.canonical(name) is not None)

    def layout(self, names: Mapping[str, object] | None, depth: int) -> Layout:
        """Return the names in both directions; without ``names``, those of the default key map."""
        key_map = self.key_map if names is None else self._select(names, "the checkpoint")
        return key_map.layout(names, depth)

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
        # cheap checks of the checkpoint first, then names, shapes and the activation
        check_trained(checkpoint, force)
        kind_of(checkpoint, self.takes, self.key_map.framework)
        names = model.state_dict()
        key_map = self._select(names, type(model).__name__)
        layout = key_map.layout(names, depth_of(checkpoint))
        check_heads(model, checkpoint, layout)
        state = layout.tower_state(names)
        check_fits(state, checkpoint, layout, f"this {type(model).__name__}")
        check_activation(model, checkpoint, key_map.activations)
        for check in self.checks:
            check(model, checkpoint, layout)
        return choose_weights(weights, state, checkpoint, layout, key_map.mask_only)

    def attach(self, model: nn.Module, checkpoint: SlimCheckpoint, **options: Any) -> Attached:
        """Replace the tower of ``model`` by the slim one; ``options`` are those of ``check``."""
        choice = self.check(model, checkpoint, **options)  # nothing is changed before it passes
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
        key_map = self.key_map if state is None else self._select(state, "the checkpoint")
        layout = key_map.layout(state, depth_of(checkpoint))
        tower = None if state is None else layout.tower_state(state)
        if tower is not None:
            check_fits(tower, checkpoint, layout, "the checkpoint of the framework")
        choice = choose_weights(weights, tower, checkpoint, layout, key_map.mask_only)
        return convert_state(state, checkpoint, layout, choice, self.obsolete_keys)

    def lines(self, output: str) -> str:
        """Return the lines to add to the framework's training script."""
        return self.script.format(output=output)
