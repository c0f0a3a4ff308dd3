"""Table of one framework: names of the tower's tensors, and how the framework is recognised."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ovsprune.core.errors import TargetError
from ovsprune.slim import SlimCheckpoint
from ovsprune.targets.layout import BlockStack, Layout, PathSpec, match_stars

__all__ = ["KINDS", "KeyMap", "depth_of", "kind_of", "select_key_map"]


@dataclass(frozen=True)
class Kind:
    """Kind of tower: its description in messages, and a tensor that all such towers have."""

    description: str
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
"""Kinds of towers that a target can take, by name."""


@dataclass(frozen=True)
class KeyMap:
    """Paths of the tower's parts in one framework.

    The fields that are not listed are those of :class:`~ovsprune.targets.layout.Layout`.

    Attributes:
        framework: Name of the framework in messages.
        stem: Canonical name outside the stacks to its path in the framework.
        stacks: Stacks of transformer blocks; none for a tower of another kind.
        marks: Paths outside the tower that distinguish this framework from others.
        activations: Paths of activation modules of the MLPs or bottlenecks, one for each stack.
        mask_only: Reason why only the mask can be used and not the slim weights; empty if both can.
        text: Layout of the text tower.
    """

    framework: str
    stem: Mapping[str, PathSpec]
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
        """Return the required paths that contain none of the tensors ``names``."""
        names = list(names)
        paths = [stack.path for stack in self.stacks]
        if not paths:  # a tower without stacks is recognised by its stem
            paths = [path for spec in self.stem.values() for path in _paths(spec)]
        return [
            path
            for path in (*paths, *self.marks)
            if not any(_is_below(name, path) for name in names)
        ]

    def depths(self, names: Iterable[str]) -> list[int]:
        """Count the blocks of each stack in the tensors ``names``."""
        names = list(names)
        counts = []
        for stack in self.stacks:
            pattern = re.compile(re.escape(stack.path) + r"\.(\d+)\.")
            counts.append(1 + max((int(m[1]) for m in map(pattern.match, names) if m), default=-1))
        return counts

    def check_names(self, names: Iterable[str], given: str) -> None:
        """Refuse a model or a checkpoint of another framework.

        Args:
            names: Names of its tensors.
            given: Description of the model or checkpoint for the message.

        Raises:
            TargetError: A path that identifies this framework is missing.
        """
        select_key_map((self,), names, given)

    def expected(self) -> str:
        """List the paths that identify the framework, for messages."""
        stacks = " and ".join(stack.path for stack in self.stacks)
        required = [f"blocks under {stacks}"] if stacks else sorted(self._roots())
        return ", ".join([*required, *self.marks])

    def _roots(self) -> set[str]:
        return {path for spec in self.stem.values() for path in _paths(spec)}

    def layout(self, names: Mapping[str, object] | None, depth: int) -> Layout:
        """Return the names of the tower's tensors, in both directions.

        Args:
            names: Names of the framework's tensors; without them every stack has its default
                share of the blocks.
            depth: Number of transformer blocks of the tower.

        Raises:
            TargetError: ``names`` belong to another framework or have another number of blocks.
        """
        counts = [int(depth * stack.share) for stack in self.stacks]
        if names is not None:
            self.check_names(names, "the checkpoint")
            counts = self.depths(names)
            if self.stacks and sum(counts) != depth:
                raise TargetError(
                    f"{self.framework} has {sum(counts)} CLIP blocks here, the slim tower has "
                    f"{depth}; build the framework with the CLIP that was pruned, or prune the "
                    "CLIP that the framework uses"
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


def select_key_map(key_maps: Sequence[KeyMap], names: Iterable[str], given: str) -> KeyMap:
    """Return the first key map that the names of a model's tensors match.

    Args:
        key_maps: Key maps of one framework.
        names: Names of the tensors.
        given: Description of the model or checkpoint for the message.

    Raises:
        TargetError: None of them matches.
    """
    names = list(names)
    for key_map in key_maps:
        if not key_map.missing(names):
            return key_map
    raise TargetError(
        f"{given} is not {key_maps[0].framework}: expected "
        f"{'; or '.join(key_map.expected() for key_map in key_maps)}. "
        "Pass the framework's model (unwrapped: model.module), or another --target "
        "(`ovsprune targets` lists them)"
    )


def kind_of(checkpoint: SlimCheckpoint, takes: tuple[str, ...], framework: str) -> str:
    """Return the kind of the slim tower, one of ``takes``.

    Raises:
        TargetError: The tower is of another kind.
    """
    tower = checkpoint.tower()
    for kind in takes:
        if KINDS[kind].mark in tower:
            return kind
    raise TargetError(
        f"{checkpoint.path} holds a {checkpoint.spec.family} tower "
        f"({checkpoint.spec.base.model}); {framework} needs "
        f"{' or '.join(KINDS[kind].description for kind in takes)}"
    )


def depth_of(checkpoint: SlimCheckpoint) -> int:
    """Count the transformer blocks of the slim tower; 0 for a tower of another kind."""
    pattern = re.compile(r"transformer\.resblocks\.(\d+)\.")
    return 1 + max((int(m[1]) for m in map(pattern.match, checkpoint.tower()) if m), default=-1)


def _is_below(name: str, path: str) -> bool:
    if "*" in path:
        return match_stars(".".join(name.split(".")[: path.count(".") + 1]), path) is not None
    return name == path or name.startswith(f"{path}.") or not path


def _paths(spec: PathSpec) -> tuple[str, ...]:
    return (spec,) if isinstance(spec, str) else spec
