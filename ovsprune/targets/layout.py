"""Where a framework keeps the parts of an image tower, name by name and in both directions.

Canonical names are those of open_clip's image towers (``transformer.resblocks.3.mlp.c_fc.weight``,
``layer1.0.conv2.weight``). A framework may keep blocks in several stacks, each counted from 0, and
one canonical tensor in several parts (queries, keys and values apart).
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

__all__ = [
    "BLOCK_PARTS",
    "POSITIONS",
    "BlockStack",
    "Layout",
    "Place",
    "block_number",
    "clip_text",
    "hf_block",
    "numbers_of",
]

Place = str | tuple[str, ...]
"""Path of a module or tensor, or the paths of the parts that make it up, one below the other."""

POSITIONS = "positional_embedding"
_TEXT = ("token_embedding", POSITIONS, "ln_final", "text_projection", "logit_scale")
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)(?:\.(.+))?")

BLOCK_PARTS: Mapping[str, Place] = {
    name: name for name in ("ln_1", "attn", "ln_2", "mlp.c_fc", "mlp.c_proj", "mlp.gelu")
}
"""Parts of a block of a framework that kept open_clip's names."""


def block_number(canonical: str) -> int:
    """The number of the transformer block that a canonical name is in; -1 outside of them."""
    found = _BLOCK.fullmatch(canonical)
    return -1 if found is None else int(found[1])


def hf_block() -> dict[str, Place]:
    """Parts of a block of transformers' CLIP and its kin, whose q, k and v are layers apart."""
    apart = {
        f"attn.in_proj_{what}": tuple(f"self_attn.{which}_proj.{what}" for which in "qkv")
        for what in ("weight", "bias")
    }
    return {
        "ln_1": "layer_norm1",
        "attn": "self_attn",
        **apart,
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "mlp.gelu": "mlp.activation_fn",
    }


@dataclass(frozen=True)
class BlockStack:
    """Blocks of a transformer under one path, counted from 0 there.

    Attributes:
        path: Path of the list of blocks.
        parts: Part of a block (``"mlp.c_fc"``) to its place in one.
        share: Share of the tower's blocks that is here, as the framework has it by default.
    """

    path: str
    parts: Mapping[str, Place]
    share: float = 1.0

    @cached_property
    def inverse(self) -> Mapping[str, tuple[str, int]]:
        """Path in a block to the part of which it is which part."""
        return _inverse(self.parts)


@dataclass(frozen=True)
class Layout:
    """Names and shapes of one tower inside one framework.

    Attributes:
        stem: Canonical name of a module or tensor outside the stacks to its place; ``""`` stands
            for the whole tower, of a framework that kept its names, and ``*`` for a number, the
            same on both sides (``layer1.*.bn1``).
        stacks: Stacks of transformer blocks, in the order of the blocks.
        starts: First block of every stack.
        depth: Blocks in all; None for any number.
        leading: Canonical tensor to the number of axes of length 1 that the framework puts first.
        transposed: Canonical tensors that the framework keeps transposed.
        stays: Canonical tensor to why the framework's own value stays, whatever the slim one is.
        absent: Canonical module to why the framework has no such thing.
        text: The text tower's layout, or None if the framework has none of CLIP's.
    """

    stem: Mapping[str, Place] = field(default_factory=dict)
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

    def places(self, canonical: str) -> tuple[str, ...]:
        """The framework's path or paths of a module or tensor of the tower; none without a place.

        Example:
            >>> Layout(stacks=(Stack("encoder.layers", hf_block()),)).places(
            ...     "transformer.resblocks.2.attn.in_proj_bias"
            ... )[0]
            'encoder.layers.2.self_attn.q_proj.bias'
        """
        block = _BLOCK.fullmatch(canonical) if self.stacks else None
        if block is None:
            return _swap(canonical, self.stem)
        index, rest = int(block[1]), block[2]
        if self.depth is not None and index >= self.depth:
            return ()
        at = max(i for i, start in enumerate(self.starts) if start <= index)
        root = f"{self.stacks[at].path}.{index - self.starts[at]}"
        if rest is None:
            return (root,)
        return tuple(f"{root}.{path}" for path in _swap(rest, self.stacks[at].parts))

    def name(self, canonical: str) -> str | None:
        """The one path of a module or tensor, or None if it has no place or several."""
        places = self.places(canonical)
        return places[0] if len(places) == 1 else None

    def canonical(self, name: str) -> str | None:
        """The canonical name of a tensor of the framework, or None if it is not the tower's."""
        found = self._find(name)
        return None if found is None else found[0]

    def _find(self, name: str) -> tuple[str, int] | None:
        """Canonical name, and which of its parts this is."""
        for stack, first in zip(self.stacks, self.starts, strict=True):
            block = re.fullmatch(re.escape(stack.path) + r"\.(\d+)(?:\.(.+))?", name)
            if block is not None:
                path = f"transformer.resblocks.{int(block[1]) + first}"
                if block[2] is None:
                    return path, 0
                part = _swap_back(block[2], stack.inverse)
                return None if part is None else (f"{path}.{part[0]}", part[1])
        return _swap_back(name, self._inverse_stem)

    def lacks(self, canonical: str) -> str | None:
        """Why the framework has no such module or tensor; None if it should have it."""
        for name, why in self.absent.items():
            if f"{canonical}.".startswith(f"{name}."):
                return why
        return None

    def to_framework(self, canonical: str, tensor: Tensor) -> dict[str, Tensor]:
        """``tensor`` of the canonical tower by the framework's names and shapes (views)."""
        if canonical in self.transposed:
            tensor = tensor.T
        tensor = tensor.reshape((1,) * self.leading.get(canonical, 0) + tuple(tensor.shape))
        places = self.places(canonical)
        if len(places) < 2:
            return dict.fromkeys(places, tensor)
        parts = torch.split(tensor, [tensor.shape[0] // len(places)] * len(places))
        return dict(zip(places, parts, strict=True))

    def tower_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tower's part of the framework's state, by canonical name and shape.

        Views, except for what is in parts there. A tensor of which a part is missing is left out.
        """
        parts: dict[str, dict[int, Tensor]] = {}
        for name, tensor in state.items():
            found = self._find(name)
            if found is not None:
                parts.setdefault(found[0], {})[found[1]] = tensor
        joined = {}
        for canonical, pieces in parts.items():
            whole = [pieces[i] for i in sorted(pieces)]
            alike = len({(t.shape[1:], t.dtype) for t in whole}) == 1
            if len(whole) == len(self.places(canonical)) and alike:
                joined[canonical] = self._to_canonical(
                    canonical, whole[0] if len(whole) == 1 else torch.cat(whole)
                )
        return joined

    def _to_canonical(self, canonical: str, tensor: Tensor) -> Tensor:
        ones = self.leading.get(canonical, 0)
        if tensor.shape[:ones] == (1,) * ones:  # another shape is for the check to report
            tensor = tensor.reshape(tensor.shape[ones:])
        return tensor.T if canonical in self.transposed and tensor.dim() == 2 else tensor


def numbers_of(name: str, pattern: str) -> list[str] | None:
    """What stands in ``name`` for the stars of ``pattern``; None if it does not match.

    Example:
        >>> numbers_of("layer1.12.downsample.0", "layer1.*.downsample.0")
        ['12']
    """
    parts, wanted = name.split("."), pattern.split(".")
    alike = len(parts) == len(wanted) and all(
        part == want or (want == "*" and part.isdigit())
        for part, want in zip(parts, wanted, strict=True)
    )
    return [p for p, want in zip(parts, wanted, strict=True) if want == "*"] if alike else None


def _key(name: str, places: Container[str], starred: Iterable[str]) -> str | None:
    """The entry of ``places`` that speaks of ``name`` itself."""
    if name in places:
        return name
    return next((key for key in starred if numbers_of(name, key) is not None), None)


def _swap(name: str, places: Mapping[str, Place]) -> tuple[str, ...]:
    """``name`` with the longest leading path in ``places`` exchanged; nothing if there is none."""
    starred = [key for key in places if "*" in key]
    head, tail = name, ""
    while True:
        key = _key(head, places, starred)
        if key is not None:
            place, numbers = places[key], numbers_of(head, key) or []
            found = (place,) if isinstance(place, str) else place
            return tuple(".".join(filter(None, (_filled(path, numbers), tail))) for path in found)
        if not head:
            return ()
        head, _, last = head.rpartition(".")
        tail = f"{last}.{tail}" if tail else last


def _filled(path: str, numbers: list[str]) -> str:
    """``path`` with its stars exchanged for ``numbers``, in their order."""
    left = iter(numbers)
    return ".".join(next(left, part) if part == "*" else part for part in path.split("."))


def _swap_back(name: str, inverse: Mapping[str, tuple[str, int]]) -> tuple[str, int] | None:
    found = _swap(name, {there: here for there, (here, _) in inverse.items()})
    if not found:
        return None
    starred = [key for key in inverse if "*" in key]
    head = name
    while (key := _key(head, inverse, starred)) is None:
        head = head.rpartition(".")[0]
    return found[0], inverse[key][1]


def _inverse(places: Mapping[str, Place]) -> dict[str, tuple[str, int]]:
    return {
        path: (here, part)
        for here, place in places.items()
        for part, path in enumerate((place,) if isinstance(place, str) else place)
    }


def clip_text(path: str, parts: Mapping[str, Place] = BLOCK_PARTS) -> Layout:
    """Return the layout of the text tower of a CLIP with open_clip's names under ``path``.

    Args:
        path: Path of the module that holds it.
        parts: Places of the parts of a block.
    """
    return Layout(
        stem={name: f"{path}.{name}" for name in _TEXT},
        stacks=(BlockStack(f"{path}.transformer.resblocks", parts),),
    )
