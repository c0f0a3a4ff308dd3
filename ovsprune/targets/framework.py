"""A framework that is told by a table: all of a target but its names.

The file of a target says where things are (:class:`~ovsprune.targets.places.Places`) and what to
write into a training script; what is asked, attached, detached and converted is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ovsprune.slim import SlimCheckpoint
from ovsprune.targets.attached import Attached, attach_tower
from ovsprune.targets.check import (
    Weights,
    check_activation,
    check_directions,
    check_fits,
    check_heads,
    check_interface,
    check_trained,
    choose_weights,
)
from ovsprune.targets.convert import Converted, convert_state
from ovsprune.targets.hooks import Hook, install
from ovsprune.targets.layout import Layout
from ovsprune.targets.places import Places, depth_of, kind_of

__all__ = ["Check", "Tabled"]

Check = Callable[[nn.Module, SlimCheckpoint, Layout], None]
"""What a framework asks beside: raises TargetError, and touches nothing."""


@dataclass(frozen=True)
class Tabled:
    """A target that is a table; its methods are those of :class:`~ovsprune.targets.Target`.

    Attributes:
        name: Of the target.
        framework: What the framework is, with its version or commit.
        places: Where it keeps what.
        takes: Kinds of slim towers that it takes, of :data:`~ovsprune.targets.places.KINDS`.
        protects: Canonical name (or what it is) to why the framework needs it as it is.
        trainable: ``fnmatch`` patterns of the parameters that a schedule may touch.
        script: Lines for its training script, with ``{output!r}`` where the directory goes.
        checks: What is asked of a live model beside the usual.
        inputs: A model to the arguments of one forward pass over one picture, by name.
        files: Names of files that belong beside the framework's checkpoint.
        derived: Patterns of keys that older versions saved, to why they are dropped.
        hooks: Functions of the framework that are exchanged so that it runs, by import path.
        fallback: Whether it is only meant where no other target knows a model.
    """

    name: str
    framework: str
    places: Places
    takes: tuple[str, ...]
    protects: Mapping[str, str]
    trainable: tuple[str, ...]
    script: str
    checks: tuple[Check, ...] = ()
    inputs: Callable[[Any], Mapping[str, Any]] | None = None
    files: tuple[str, ...] = ()
    derived: Mapping[str, str] = field(default_factory=dict)
    hooks: tuple[Hook, ...] = ()
    fallback: bool = False

    def detect(self, model: nn.Module) -> bool:
        """Whether ``model`` has the stacks of blocks, and what stands beside them."""
        return not self.places.missing(model.state_dict())

    def towers(self, model: nn.Module) -> dict[str, str]:
        """Parts of the tower to their paths; raises TargetError where ``model`` is another's."""
        names = model.state_dict()
        self.places.check_names(names, type(model).__name__)
        found, first = {}, 0
        for stack, count in zip(self.places.stacks, self.places.depths(names), strict=True):
            found[f"blocks {first}-{first + count - 1}"] = stack.path
            first += count
        return found or {part: str(place) for part, place in self.places.stem.items()}

    def layout(self, names: Mapping[str, object] | None, depth: int) -> Layout:
        """Names in both directions; without ``names`` as the framework has it by default."""
        return self.places.layout(names, depth)

    def example(self, model: nn.Module) -> Mapping[str, Any] | None:
        """Arguments of one forward pass over one picture, or None if they cannot be told."""
        return None if self.inputs is None else self.inputs(model)

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
        kind_of(checkpoint, self.takes, self.places.framework)
        check_directions(checkpoint)
        check_interface(checkpoint)
        self.towers(model)
        names = model.state_dict()
        layout = self.layout(names, depth_of(checkpoint))
        check_heads(model, checkpoint, layout)
        state = layout.tower_state(names)
        check_fits(state, checkpoint, layout, f"this {type(model).__name__}")
        check_activation(model, checkpoint, self.places.activations)
        for check in self.checks:
            check(model, checkpoint, layout)
        return choose_weights(weights, state, checkpoint, layout, self.places.mask_only)

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
        return attach_tower(
            model,
            checkpoint,
            self.layout(model.state_dict(), depth_of(checkpoint)),
            choice,
            target=self.name,
            protected=self.protects,
            trainable=self.trainable,
        )

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
        kind_of(checkpoint, self.takes, self.places.framework)
        check_directions(checkpoint)
        check_interface(checkpoint)
        layout = self.layout(state, depth_of(checkpoint))
        tower = None if state is None else layout.tower_state(state)
        if tower is not None:
            check_fits(tower, checkpoint, layout, "the checkpoint of the framework")
        choice = choose_weights(weights, tower, checkpoint, layout, self.places.mask_only)
        return convert_state(state, checkpoint, layout, choice, self.derived)

    def lines(self, output: str) -> str:
        """Lines for the framework's training script."""
        return self.script.format(output=output)
