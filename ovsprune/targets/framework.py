"""A framework that is told by a table: all of a target but its names.

The file of a target says where things are (:class:`~ovsprune.targets.key_map.KeyMap`) and what to
write into a training script; what is asked, attached, detached and converted is the same for all.
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
"""What a framework asks beside: raises TargetError, and touches nothing."""

CompatFix = Callable[[Any], Sequence[Swap]]
"""What a live model needs to run with today's libraries: entries to exchange, none if it has them;
touches nothing itself."""


@dataclass(frozen=True)
class TableTarget:
    """A target that is a table; its methods are those of :class:`~ovsprune.targets.Target`.

    Attributes:
        name: Of the target.
        framework: What the framework is, with its version or commit.
        places: Where it keeps what.
        takes: Kinds of slim towers that it takes, of :data:`~ovsprune.targets.key_map.KINDS`.
        protects: Canonical name (or what it is) to why the framework needs it as it is.
        trainable: ``fnmatch`` patterns of the parameters that a schedule may touch.
        script: Lines for its training script, with ``{output!r}`` where the directory goes.
        checks: What is asked of a live model beside the usual.
        builds: More places, of builds of the framework that keep the tower elsewhere; the first of
            all that a model's names tell of is taken, ``places`` where there are no names.
        compat_fixes: What lets a live model run with today's libraries; undone on detaching.
        inputs: A model to the arguments of one forward pass over one picture, by name.
        prepares: What a copy of the model needs before its costs are counted on them, in place.
        files: Names of files that belong beside the framework's checkpoint.
        obsolete_keys: Patterns of keys that older versions saved, to why they are dropped.
        hooks: Functions of the framework that are exchanged so that it runs, by import path.
        no_grad_methods: Methods, by their paths from the model, in which the framework runs its
            tower, where it does so without gradients.
        fallback: Whether it is only meant where no other target knows a model.
    """

    name: str
    framework: str
    places: KeyMap
    takes: tuple[str, ...]
    protects: Mapping[str, str]
    trainable: tuple[str, ...]
    script: str
    checks: tuple[Check, ...] = ()
    builds: tuple[KeyMap, ...] = ()
    compat_fixes: tuple[CompatFix, ...] = ()
    inputs: Callable[[Any], Mapping[str, Any]] | None = None
    prepares: Callable[[Any], None] | None = None
    files: tuple[str, ...] = ()
    obsolete_keys: Mapping[str, str] = field(default_factory=dict)
    hooks: tuple[Hook, ...] = ()
    no_grad_methods: tuple[str, ...] = ()
    fallback: bool = False

    def detect(self, model: nn.Module) -> bool:
        """Whether ``model`` has the stacks of blocks, and what stands beside them."""
        names = list(model.state_dict())
        return any(not places.missing(names) for places in (self.key_map, *self.variants))

    def _places(self, names: Mapping[str, object] | None, given: str) -> KeyMap:
        """The build that ``names`` tell of; raises TargetError where they are another's."""
        if names is None:
            return self.key_map
        return select_key_map((self.key_map, *self.variants), names, given)

    def towers(self, model: nn.Module) -> dict[str, str]:
        """Parts of the tower to their paths; raises TargetError where ``model`` is another's."""
        names = model.state_dict()
        places = self._places(names, type(model).__name__)
        found, first = {}, 0
        for stack, count in zip(places.stacks, places.depths(names), strict=True):
            found[f"blocks {first}-{first + count - 1}"] = stack.path
            first += count
        return found or {part or "tower": str(place) for part, place in places.stem.items()}

    def tower_names(self, model: nn.Module) -> frozenset[str]:
        """Names of the tower's tensors; raises TargetError where ``model`` is another's."""
        names = model.state_dict()
        places = self._places(names, type(model).__name__)
        layout = places.layout(names, sum(places.depths(names)))
        return frozenset(name for name in names if layout.canonical(name) is not None)

    def layout(self, names: Mapping[str, object] | None, depth: int) -> Layout:
        """Names in both directions; without ``names`` as the framework has it by default."""
        return self._places(names, "the checkpoint").layout(names, depth)

    def example(self, model: nn.Module) -> Mapping[str, Any] | None:
        """Arguments of one forward pass over one picture, or None if they cannot be told."""
        return None if self.inputs is None else self.inputs(model)

    def prepare(self, model: nn.Module) -> None:
        """Make a copy of the framework's model ready to be run on ``example``, in place."""
        self.apply_compat(model)
        if self.prepares is not None:
            self.prepares(model)

    def apply_compat(self, model: nn.Module) -> Applied:
        """Let the framework's model run with today's libraries; what comes back undoes it."""
        return exchange([swap for fix in self.compat_fixes for swap in fix(model)])

    def enable_tower_grad(self, model: nn.Module) -> Applied:
        """Let gradients reach the tower while the model trains; what comes back undoes it."""
        return enable_tower_grad(model, self.no_grad_methods)

    def check(
        self,
        model: nn.Module,
        checkpoint: SlimCheckpoint,
        *,
        weights: str = "auto",
        force: bool = False,
    ) -> tuple[Weights, str]:
        """Whether ``model`` can take the slim tower; TargetError says why not."""
        check_trained(checkpoint, force)
        kind_of(checkpoint, self.takes, self.key_map.framework)
        names = model.state_dict()
        places = self._places(names, type(model).__name__)
        layout = places.layout(names, depth_of(checkpoint))
        check_heads(model, checkpoint, layout)
        state = layout.tower_state(names)
        check_fits(state, checkpoint, layout, f"this {type(model).__name__}")
        check_activation(model, checkpoint, places.activations)
        for check in self.checks:
            check(model, checkpoint, layout)
        return choose_weights(weights, state, checkpoint, layout, places.mask_only)

    def attach(
        self,
        model: nn.Module,
        checkpoint: SlimCheckpoint,
        *,
        weights: str = "auto",
        force: bool = False,
    ) -> Attached:
        """Put the slim tower into ``model``, in place."""
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
        attached.notes += tuple(f"bridged to today's libraries: {s.path}" for s in compat_fixes)
        return attached

    def convert(
        self,
        state: Mapping[str, Tensor] | None,
        checkpoint: SlimCheckpoint,
        *,
        weights: str = "auto",
        force: bool = False,
    ) -> Converted:
        """The framework's saved state with the slim tower in it."""
        check_trained(checkpoint, force)
        kind_of(checkpoint, self.takes, self.key_map.framework)
        places = self._places(state, "the checkpoint")
        layout = places.layout(state, depth_of(checkpoint))
        tower = None if state is None else layout.tower_state(state)
        if tower is not None:
            check_fits(tower, checkpoint, layout, "the checkpoint of the framework")
        choice = choose_weights(weights, tower, checkpoint, layout, places.mask_only)
        return convert_state(state, checkpoint, layout, choice, self.obsolete_keys)

    def lines(self, output: str) -> str:
        """Lines for the framework's training script."""
        return self.script.format(output=output)
