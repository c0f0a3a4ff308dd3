"""Where a framework keeps the parts of a CLIP ViT, name by name and in both directions.

Canonical names are those of open_clip's image tower (``transformer.resblocks.3.mlp.c_fc.weight``).
Frameworks that read features half-way split the blocks in two stacks and count the second from 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["BLOCK_PARTS", "POSITIONS", "Layout", "split_of"]

POSITIONS = "positional_embedding"
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)(?:\.(.+))?")

BLOCK_PARTS: Mapping[str, str] = {
    name: name for name in ("ln_1", "attn", "ln_2", "mlp.c_fc", "mlp.c_proj", "mlp.gelu")
}
"""Parts of a block of a framework that kept open_clip's names."""


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the tower inside one framework.

    Attributes:
        front: Path of the stack with blocks ``0 .. split - 1``.
        back: Path of the stack with blocks ``split .. depth - 1``, counted from 0 there.
        split: Blocks in front.
        depth: Blocks in all.
        front_parts: Part of a block to its path in a block of the front stack.
        back_parts: The same for the back stack.
        stem: Canonical name of a module or tensor outside the blocks to its path.
        leading: Canonical tensor to the number of axes of length 1 that the framework puts first.
        transposed: Canonical tensors that the framework keeps transposed.
        text: Canonical name of a module or tensor of the text tower to its path.
        text_parts: Part of a text block to its path in the framework's.
        text_blocks: Path of the text blocks.
    """

    front: str
    back: str
    split: int
    depth: int
    front_parts: Mapping[str, str]
    back_parts: Mapping[str, str]
    stem: Mapping[str, str]
    leading: Mapping[str, int] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    text: Mapping[str, str] = field(default_factory=dict)
    text_parts: Mapping[str, str] = field(default_factory=dict)
    text_blocks: str = ""

    def name(self, canonical: str) -> str | None:
        """The framework's path of a module or tensor of the tower, or None if it has no place."""
        block = _BLOCK.fullmatch(canonical)
        if block is None:
            return _swap(canonical, self.stem)
        index, rest = int(block[1]), block[2]
        if index >= self.depth:
            return None
        stack, parts = (
            (f"{self.front}.{index}", self.front_parts)
            if index < self.split
            else (f"{self.back}.{index - self.split}", self.back_parts)
        )
        if rest is None:
            return stack
        part = _swap(rest, parts)
        return None if part is None else f"{stack}.{part}"

    def canonical(self, name: str) -> str | None:
        """The canonical name of a module or tensor of the framework, or None if not the tower's."""
        for stack, first, parts in (
            (self.front, 0, self.front_parts),
            (self.back, self.split, self.back_parts),
        ):
            block = re.fullmatch(re.escape(stack) + r"\.(\d+)(?:\.(.+))?", name)
            if block is not None:
                path = f"transformer.resblocks.{int(block[1]) + first}"
                part = None if block[2] is None else _swap(block[2], _inverse(parts))
                if block[2] is None:
                    return path
                return None if part is None else f"{path}.{part}"
        return _swap(name, _inverse(self.stem))

    def text_name(self, canonical: str) -> str | None:
        """The framework's path of a tensor of the text tower, or None if it has no place."""
        block = _BLOCK.fullmatch(canonical)
        if block is None:
            return _swap(canonical, self.text)
        part = _swap(block[2] or "", self.text_parts)
        return None if part is None else f"{self.text_blocks}.{block[1]}.{part}"

    def to_framework(self, canonical: str, tensor: Tensor) -> Tensor:
        """``tensor`` of the canonical tower in the framework's shape (a view)."""
        if canonical in self.transposed:
            tensor = tensor.T
        return tensor.reshape((1,) * self.leading.get(canonical, 0) + tuple(tensor.shape))

    def to_canonical(self, canonical: str, tensor: Tensor) -> Tensor:
        """``tensor`` of the framework, for the canonical name ``canonical``, in its shape there."""
        ones = self.leading.get(canonical, 0)
        if tensor.shape[:ones] == (1,) * ones:  # another shape is for the check to report
            tensor = tensor.reshape(tensor.shape[ones:])
        return tensor.T if canonical in self.transposed and tensor.dim() == 2 else tensor

    def tower_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tower's part of the framework's state, by canonical name and shape (views)."""
        found = {}
        for name, tensor in state.items():
            canonical = self.canonical(name)
            if canonical is not None:
                found[canonical] = self.to_canonical(canonical, tensor)
        return found


def split_of(names: Mapping[str, object], front: str, back: str) -> tuple[int, int] | None:
    """(blocks in front, blocks in all) that ``names`` tell of, or None without both stacks."""
    counts = []
    for stack in (front, back):
        pattern = re.compile(re.escape(stack) + r"\.(\d+)\.")
        found = [int(m[1]) for m in map(pattern.match, names) if m]
        if not found:
            return None
        counts.append(max(found) + 1)
    return counts[0], sum(counts)


def _swap(name: str, paths: Mapping[str, str]) -> str | None:
    """``name`` with the longest leading path in ``paths`` exchanged, or None if there is none."""
    head, tail = name, ""
    while head:
        if head in paths:
            return paths[head] + tail
        head, dot, last = head.rpartition(".")
        tail = f"{dot}{last}{tail}"
    return None


def _inverse(paths: Mapping[str, str]) -> dict[str, str]:
    return {there: here for here, there in paths.items()}
