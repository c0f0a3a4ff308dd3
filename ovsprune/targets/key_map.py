"""Table of one framework: names of the tower's tensors, and how the framework is recognised."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ovsprune.core.errors import TargetError
from ovsprune.slim import SlimCheckpoint
from ovsprune.targets.layout import Layout, count_blocks, match_stars, split_spec

__all__ = ["KINDS", "KeyMap", "depth_of", "kind_of"]


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


@dataclass(frozen=True, kw_only=True)
class KeyMap(Layout):
    """Layout of the tower in one framework, and paths that identify the framework.

    The other attributes are those of :class:`~ovsprune.targets.layout.Layout`; :meth:`layout` sets
    ``starts`` and ``depth``.

    Attributes:
        framework: Name of the framework in messages.
        activations: Paths of activation modules of the MLPs or bottlenecks, one for each stack.
        marks: Paths outside the tower that distinguish this framework from others.
        mask_only: Reason why only the mask can be used and not the slim weights; empty if both can.
    """

    framework: str
    activations: tuple[str, ...]
    marks: tuple[str, ...] = ()
    mask_only: str = ""

    def _roots(self) -> list[str]:
        """Return the paths of the stacks; those of the stem for a tower without stacks."""
        stem = [path for spec in self.stem.values() for path in split_spec(spec)]
        return [stack.path for stack in self.stacks] or stem

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return the required paths that contain none of the tensors ``names``."""
        names = list(names)
        paths = (*self._roots(), *self.marks)
        return [path for path in paths if not any(_is_below(name, path) for name in names)]

    def expected(self) -> str:
        """List the paths that identify the framework, for messages."""
        roots = self._roots()
        required = [f"blocks under {' and '.join(roots)}"] if self.stacks else sorted(set(roots))
        return ", ".join([*required, *self.marks])

    def depths(self, names: Iterable[str]) -> list[int]:
        """Count the blocks of each stack in the tensors ``names``."""
        names = list(names)
        return [count_blocks(names, stack.path) for stack in self.stacks]

    def layout(self, names: Iterable[str] | None, depth: int) -> Layout:
        """Return the layout of a tower with ``depth`` blocks; ``names`` are those of a model.

        Without names, every stack has its default share of the blocks. Names with another number of
        blocks are refused.
        """
        counts = [int(depth * stack.share) for stack in self.stacks]  # blocks of each stack
        if names is not None and self.stacks:
            counts = self.depths(names)
            if sum(counts) != depth:
                raise TargetError(
                    f"{self.framework} has {sum(counts)} CLIP blocks here, the slim tower has "
                    f"{depth}; build the framework with the CLIP that was pruned, or prune the "
                    "CLIP that the framework uses"
                )
        # first block of each stack, counted over all stacks
        starts = tuple(sum(counts[:i]) for i in range(len(counts)))
        return replace(self, starts=starts, depth=depth if self.stacks else None)


def kind_of(checkpoint: SlimCheckpoint, takes: tuple[str, ...], framework: str) -> str:
    """Return the kind of the slim tower, one of ``takes``; refuse another kind."""
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
    return count_blocks(checkpoint.tower())


def _is_below(name: str, path: str) -> bool:
    """Return True if the tensor ``name`` is at ``path`` or below it; stars match numbers."""
    if "*" in path:
        return match_stars(".".join(name.split(".")[: path.count(".") + 1]), path) is not None
    # The empty path is the model itself, which contains every name.
    return name == path or name.startswith(f"{path}.") or not path
