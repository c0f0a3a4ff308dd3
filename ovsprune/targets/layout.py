"""Names of an image tower's tensors in a framework, in both directions.

Canonical names are those of open_clip's image towers (``transformer.resblocks.3.mlp.c_fc.weight``,
``layer1.0.conv2.weight``). A framework may keep blocks in several stacks, each counted from 0, and
one canonical tensor in several parts (queries, keys and values).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

__all__ = [
    "BLOCK_PARTS",
    "POSITIONS",
    "TEXT_STEM",
    "VIT_STEM",
    "BlockStack",
    "Layout",
    "PathSpec",
    "clip_text",
    "count_blocks",
    "hf_block",
    "match_stars",
    "split_spec",
    "under",
]

PathSpec = str | tuple[str, ...]
"""Path of a module or tensor, or the paths of its parts, which are concatenated along axis 0."""

POSITIONS = "positional_embedding"
VIT_STEM = ("class_embedding", POSITIONS, "conv1", "ln_pre", "ln_post", "proj")
"""Canonical names outside the blocks of a vision transformer."""

TEXT_STEM = ("token_embedding", POSITIONS, "ln_final", "text_projection", "logit_scale")
"""Canonical names outside the blocks of a text tower."""

_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)(?:\.(.+))?")

BLOCK_PARTS: Mapping[str, PathSpec] = {
    name: name for name in ("ln_1", "attn", "ln_2", "mlp.c_fc", "mlp.c_proj", "mlp.gelu")
}
"""Parts of a block in a framework that uses open_clip's names."""


def count_blocks(names: Iterable[str], path: str = "transformer.resblocks") -> int:
    """Count the blocks under ``path`` in the names of tensors; 0 if there are none."""
    pattern = re.compile(re.escape(path) + r"\.(\d+)\.")
    return 1 + max((int(m[1]) for m in map(pattern.match, names) if m), default=-1)


def under(path: str, names: Iterable[str]) -> dict[str, str]:
    """Return the paths of parts that have their canonical names under ``path``."""
    return {name: f"{path}.{name}" for name in names}


def split_spec(spec: PathSpec) -> tuple[str, ...]:
    """Return the paths of a module or tensor, or of its parts."""
    return (spec,) if isinstance(spec, str) else spec


def hf_block() -> dict[str, PathSpec]:
    """Return the parts of a block of transformers' CLIP, with separate layers for q, k and v."""
    projections = {
        f"attn.in_proj_{what}": tuple(f"self_attn.{which}_proj.{what}" for which in "qkv")
        for what in ("weight", "bias")
    }
    return {
        "ln_1": "layer_norm1",
        "attn": "self_attn",
        **projections,
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "mlp.gelu": "mlp.activation_fn",
    }


@dataclass(frozen=True)
class BlockStack:
    """Transformer blocks under one path, counted from 0 there.

    Attributes:
        path: Path of the list of blocks.
        parts: Part of a block (``"mlp.c_fc"``) to its path in a block of the framework.
        share: Fraction of the tower's blocks in this stack, as the framework has it by default.
    """

    path: str
    parts: Mapping[str, PathSpec]
    share: float = 1.0

    @cached_property
    def inverse(self) -> Mapping[str, tuple[str, int]]:
        """Canonical part and index among its paths, by path in a block."""
        return _inverse(self.parts)


@dataclass(frozen=True)
class Layout:
    """Names and shapes of one tower inside one framework.

    Attributes:
        stem: Canonical name of a module or tensor outside the stacks to its path. ``""`` is the
            whole tower, for a framework that uses the canonical names. ``*`` stands for a number,
            the same on both sides (``layer1.*.bn1``).
        stacks: Stacks of transformer blocks, in the order of the blocks.
        starts: First block of every stack.
        depth: Total number of blocks; None for any number.
        leading: Canonical tensor to the number of leading axes of length 1 in the framework.
        transposed: Canonical tensors that the framework stores transposed.
        stays: Canonical tensor to the reason why the framework's value is kept in any case.
        absent: Canonical module to the reason why the framework does not have it.
        text: Layout of the text tower; None if the framework does not contain CLIP's.
    """

    stem: Mapping[str, PathSpec] = field(default_factory=dict)
    stacks: tuple[BlockStack, ...] = ()
    starts: tuple[int, ...] = (0,)
    depth: int | None = None
    leading: Mapping[str, int] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    stays: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    text: Layout | None = None

    @cached_property
    def _inverse_stem(self) -> Mapping[str, tuple[str, int]]:
        return _inverse(self.stem)

    def paths(self, canonical: str) -> tuple[str, ...]:
        """Return the framework's path or paths of a module or tensor; empty if it has none.

        Example:
            >>> Layout(stacks=(BlockStack("encoder.layers", hf_block()),)).paths(
            ...     "transformer.resblocks.2.attn.in_proj_bias"
            ... )[0]
            'encoder.layers.2.self_attn.q_proj.bias'
        """
        block = _BLOCK.fullmatch(canonical) if self.stacks else None
        if block is None:
            return _translate(canonical, self.stem)
        index, rest = int(block[1]), block[2]
        if self.depth is not None and index >= self.depth:
            return ()  # the framework's tower has fewer blocks
        # the last stack that starts at or before the block
        number = max(i for i, start in enumerate(self.starts) if start <= index)
        stack = self.stacks[number]
        root = f"{stack.path}.{index - self.starts[number]}"
        if rest is None:
            return (root,)
        return tuple(f"{root}.{path}" for path in _translate(rest, stack.parts))

    def name(self, canonical: str) -> str | None:
        """Return the path of a module or tensor; None if it has no path or several."""
        paths = self.paths(canonical)
        return paths[0] if len(paths) == 1 else None

    def canonical(self, name: str) -> str | None:
        """Return the canonical name of a tensor of the framework; None outside the tower."""
        part = self._part(name)
        return None if part is None else part[0]

    def _part(self, name: str) -> tuple[str, int] | None:
        """Return the canonical name, and the index of ``name`` among its paths."""
        for stack, first in zip(self.stacks, self.starts, strict=True):
            block = re.fullmatch(re.escape(stack.path) + r"\.(\d+)(?:\.(.+))?", name)
            if block is not None:
                path = f"transformer.resblocks.{int(block[1]) + first}"
                if block[2] is None:
                    return path, 0
                part = _translate_back(block[2], stack.inverse)
                return None if part is None else (f"{path}.{part[0]}", part[1])
        return _translate_back(name, self._inverse_stem)

    def absent_reason(self, canonical: str) -> str | None:
        """Return why the framework lacks a module or tensor; None if it should have it."""
        # The dots at the end prevent a match of head with header.
        reasons = (r for n, r in self.absent.items() if f"{canonical}.".startswith(f"{n}."))
        return next(reasons, None)

    def to_framework(self, canonical: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return views of a canonical tensor with the framework's names and shapes."""
        if canonical in self.transposed:
            tensor = tensor.T
        # [...] -> [1, ..., 1, ...]
        tensor = tensor.reshape((1,) * self.leading.get(canonical, 0) + tuple(tensor.shape))
        paths = self.paths(canonical)
        if len(paths) < 2:
            return dict.fromkeys(paths, tensor)
        # [3 * E, E] -> three of [E, E]
        parts = torch.split(tensor, [tensor.shape[0] // len(paths)] * len(paths))
        return dict(zip(paths, parts, strict=True))

    def tower_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tower's part of the framework's state dict, by canonical name and shape.

        The values are views, except for tensors that the framework stores in parts. A tensor with a
        missing part is left out.
        """
        parts: dict[str, dict[int, Tensor]] = {}
        for name, tensor in state.items():
            if (part := self._part(name)) is not None:
                canonical, index = part
                parts.setdefault(canonical, {})[index] = tensor  # index: 0, 1, 2 for q, k, v
        tower = {}
        for canonical, by_index in parts.items():
            tensors = [by_index[i] for i in sorted(by_index)]
            compatible = len({(t.shape[1:], t.dtype) for t in tensors}) == 1
            if len(tensors) == len(self.paths(canonical)) and compatible:
                # three of [E, E] -> [3 * E, E]; one tensor stays a view
                tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
                tower[canonical] = self._to_canonical(canonical, tensor)
        return tower

    def _to_canonical(self, canonical: str, tensor: Tensor) -> Tensor:
        """Remove the leading axes of length 1, and transpose back."""
        ones = self.leading.get(canonical, 0)
        if tensor.shape[:ones] == (1,) * ones:  # another shape is reported by check_fits
            tensor = tensor.reshape(tensor.shape[ones:])
        return tensor.T if canonical in self.transposed and tensor.dim() == 2 else tensor


def match_stars(name: str, pattern: str) -> list[str] | None:
    """Return the numbers in ``name`` at the stars of ``pattern``; None if it does not match.

    Example:
        >>> match_stars("layer1.12.downsample.0", "layer1.*.downsample.0")
        ['12']
    """
    parts, keys = name.split("."), pattern.split(".")
    if len(parts) != len(keys):
        return None
    pairs = list(zip(parts, keys, strict=True))
    if any(part != key and not (key == "*" and part.isdigit()) for part, key in pairs):
        return None
    return [part for part, key in pairs if key == "*"]


def _longest_prefix(name: str, table: Collection[str]) -> tuple[str, list[str], str] | None:
    """Return the key of the longest prefix that ``table`` has, its numbers, and the rest."""
    starred = [key for key in table if "*" in key]
    head, rest = name, ""
    while True:
        exact = [head] if head in table else []  # preferred to a key with stars
        for key in (*exact, *starred):
            numbers = match_stars(head, key)
            if numbers is not None:
                return key, numbers, rest
        if not head:
            return None
        head, _, last = head.rpartition(".")
        rest = f"{last}.{rest}" if rest else last


def _fill(path: str, numbers: list[str], rest: str) -> str:
    """Replace the stars of ``path`` by ``numbers``, in order, and append ``rest``."""
    # The same number stands for the same star on both sides, in order.
    remaining = iter(numbers)
    parts = (next(remaining, part) if part == "*" else part for part in path.split("."))
    return ".".join(filter(None, (*parts, rest)))


def _translate(name: str, table: Mapping[str, PathSpec]) -> tuple[str, ...]:
    """Replace the longest prefix of ``name`` that ``table`` has; empty if it has none."""
    match = _longest_prefix(name, table)
    if match is None:
        return ()
    key, numbers, rest = match
    return tuple(_fill(path, numbers, rest) for path in split_spec(table[key]))


def _translate_back(name: str, inverse: Mapping[str, tuple[str, int]]) -> tuple[str, int] | None:
    """Return the canonical name of ``name``, and the index of its path among several."""
    match = _longest_prefix(name, inverse)
    if match is None:
        return None
    key, numbers, rest = match
    canonical, index = inverse[key]
    return _fill(canonical, numbers, rest), index


def _inverse(table: Mapping[str, PathSpec]) -> dict[str, tuple[str, int]]:
    """Return the map from a path to the canonical name and the index of the path."""
    return {
        path: (canonical, index)
        for canonical, spec in table.items()
        for index, path in enumerate(split_spec(spec))
    }


def clip_text(path: str, parts: Mapping[str, PathSpec] = BLOCK_PARTS) -> Layout:
    """Return the layout of the text tower of a CLIP with open_clip's names under ``path``."""
    return Layout(
        stem=under(path, TEXT_STEM),
        stacks=(BlockStack(f"{path}.transformer.resblocks", parts),),
    )
