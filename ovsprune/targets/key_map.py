"""The table of one framework: which of its names are the image tower's, and what tells it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ovsprune.core.errors import TargetError
from ovsprune.slim import SlimCheckpoint
from ovsprune.targets.layout import BlockStack, Layout, Place, numbers_of

__all__ = ["KINDS", "KeyMap", "depth_of", "kind_of", "places_of"]


@dataclass(frozen=True)
class Kind:
    """One kind of tower: what it is called in messages, and a tensor that all of it have."""

    says: str
    mark: str


KINDS: Mapping[str, Kind] = {
    "vit": Kind(
        "a CLIP vision transformer (family of ViT-B-16)",
        "transformer.resblocks.0.attn.in_proj_weight",
    ),
    "resnet": Kind("CLIP's residual network (family of RN50)", "layer1.0.conv1.weight"),
    "convnext": Kind(
        "a ConvNeXt of open_clip (family of convnext_large_d_320)",
        "trunk.stages.0.blocks.0.mlp.fc1.weight",
    ),
}
"""Kinds of towers that targets take, by the name that they give."""


@dataclass(frozen=True)
class KeyMap:
    """Where one framework keeps what; see :class:`~ovsprune.targets.layout.Layout` for the rest.

    Attributes:
        framework: Its name in messages.
        stem: Canonical name outside the stacks to its place.
        stacks: Stacks of transformer blocks; none for a tower of another kind.
        marks: Paths beside the tower that tell this framework from others.
        activations: Paths of the activation between the units, one of each stack.
        mask_only: Why the slim weights cannot be taken, only the mask; empty if they can.
        text: The text tower's layout.
    """

    framework: str
    stem: Mapping[str, Place]
    activations: tuple[str, ...]
    stacks: tuple[BlockStack, ...] = ()
    marks: tuple[str, ...] = ()
    leading: Mapping[str, int] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    stays: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    mask_only: str = ""
    text: Layout | None = None

    def missing(self, names: Iterable[str]) -> list[str]:
        """Paths that the framework has and of which ``names`` (of tensors) tell nothing."""
        names = list(names)
        paths = [stack.path for stack in self.stacks]
        if not paths:  # a tower without stacks is told by the first part of every place
            paths = [p for place in self.stem.values() for p in _paths(place)]
        return [
            path for path in (*paths, *self.marks) if not any(_below(name, path) for name in names)
        ]

    def depths(self, names: Iterable[str]) -> list[int]:
        """Blocks of each stack that ``names`` tell of."""
        names = list(names)
        counts = []
        for stack in self.stacks:
            pattern = re.compile(re.escape(stack.path) + r"\.(\d+)\.")
            counts.append(1 + max((int(m[1]) for m in map(pattern.match, names) if m), default=-1))
        return counts

    def check_names(self, names: Iterable[str], given: str) -> None:
        """Refuse a model or a checkpoint that is not this framework's.

        Raises:
            TargetError: Something is missing by which it is told.
        """
        places_of((self,), names, given)

    def expected(self) -> str:
        """By what the framework is told, for messages."""
        stacks = " and ".join(stack.path for stack in self.stacks)
        found = [f"blocks under {stacks}"] if stacks else sorted(self._roots())
        return ", ".join([*found, *self.marks])

    def _roots(self) -> set[str]:
        return {path for place in self.stem.values() for path in _paths(place)}

    def layout(self, names: Mapping[str, object] | None, depth: int) -> Layout:
        """Names in both directions; without ``names`` the stacks have their default shares.

        Raises:
            TargetError: ``names`` are another framework's, or have another number of blocks.
        """
        counts = [int(depth * stack.share) for stack in self.stacks]
        if names is not None:
            self.check_names(names, "the checkpoint")
            counts = self.depths(names)
            if self.stacks and sum(counts) != depth:
                raise TargetError(
                    f"{self.framework} has {sum(counts)} CLIP blocks here, the slim tower has "
                    f"{depth}; build the framework with the CLIP that was pruned, or prune the one "
                    "it uses"
                )
        starts = tuple(sum(counts[:i]) for i in range(len(counts)))
        return Layout(
            stem=self.stem,
            stacks=self.stacks,
            starts=starts,
            depth=depth if self.stacks else None,
            leading=self.leading,
            transposed=self.transposed,
            stays=self.stays,
            absent=self.absent,
            text=self.text,
        )


def places_of(builds: Sequence[KeyMap], names: Iterable[str], given: str) -> KeyMap:
    """The first of a framework's builds that ``names`` (of tensors) tell of.

    Raises:
        TargetError: None of them.
    """
    names = list(names)
    for places in builds:
        if not places.missing(names):
            return places
    raise TargetError(
        f"{given} is not {builds[0].framework}: expected "
        f"{'; or '.join(places.expected() for places in builds)}. "
        "Give the framework's own model (unwrapped: model.module), or another --target "
        "(`ovsprune targets` lists them)"
    )


def kind_of(checkpoint: SlimCheckpoint, takes: tuple[str, ...], framework: str) -> str:
    """Which of the kinds in ``takes`` the slim tower is.

    Raises:
        TargetError: None of them.
    """
    tower = checkpoint.tower()
    for kind in takes:
        if KINDS[kind].mark in tower:
            return kind
    raise TargetError(
        f"{checkpoint.path} holds a {checkpoint.spec.family} tower "
        f"({checkpoint.spec.base.model}); {framework} needs "
        f"{' or '.join(KINDS[kind].says for kind in takes)}"
    )


def depth_of(checkpoint: SlimCheckpoint) -> int:
    """Transformer blocks of the slim tower; 0 for a tower of another kind."""
    found = re.compile(r"transformer\.resblocks\.(\d+)\.")
    return 1 + max((int(m[1]) for m in map(found.match, checkpoint.tower()) if m), default=-1)


def _below(name: str, path: str) -> bool:
    if "*" in path:
        return numbers_of(".".join(name.split(".")[: path.count(".") + 1]), path) is not None
    return name == path or name.startswith(f"{path}.") or not path


def _paths(place: Place) -> tuple[str, ...]:
    return (place,) if isinstance(place, str) else place
