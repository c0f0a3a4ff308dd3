"""Vocabulary of the procedural scenes: classes, colours, materials, held-out combinations."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from ovsprune.calibration.scenes.shapes import SHAPES

OBJECTS: tuple[str, ...] = tuple(SHAPES)
"""Names of the object classes; the index in this tuple is the class id."""

GROUNDS: tuple[str, ...] = ("grass", "sand", "water", "road", "snow", "brick floor")
"""Background classes below the horizon."""

SKIES: tuple[str, ...] = ("blue sky", "night sky", "sunset", "storm clouds")
"""Background classes above the horizon."""

CLASS_NAMES: tuple[str, ...] = OBJECTS + GROUNDS + SKIES
"""All class names. A label map contains indices into this tuple and no void pixels."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (212, 36, 40),
    "orange": (246, 138, 22),
    "yellow": (248, 220, 46),
    "green": (36, 150, 58),
    "blue": (36, 84, 214),
    "purple": (142, 52, 178),
    "white": (240, 240, 236),
    "black": (36, 36, 40),
}
"""Colour names and their sRGB values in 0..255."""

MATERIALS: tuple[str, ...] = ("plain", "striped", "dotted", "metallic")
"""Names of the surfaces."""


class Combination(NamedTuple):
    """Colour, material and shape, by name."""

    colour: str
    material: str
    shape: str

    @property
    def phrase(self) -> str:
        """Phrase for captions and prompts, for example ``"red striped mug"``."""
        return f"{self.colour} {self.material} {self.shape}"


def is_held_out(combination: Combination) -> bool:
    """Return True if training never renders this combination.

    The rule is ``(shape + colour + 3 * material) % 8 == 0`` on the indices in `OBJECTS`,
    `COLOURS` and `MATERIALS`. It holds out an eighth of all combinations: one colour for every
    shape and material, so that every pair of words still occurs in training.
    """
    shape = OBJECTS.index(combination.shape)
    colour = tuple(COLOURS).index(combination.colour)
    material = MATERIALS.index(combination.material)
    return (shape + colour + 3 * material) % 8 == 0


_ALL = tuple(Combination(c, m, s) for s, c, m in product(OBJECTS, COLOURS, MATERIALS))

HELD_OUT: tuple[Combination, ...] = tuple(c for c in _ALL if is_held_out(c))
"""Combinations that only the split ``combinations`` renders (96 of 768)."""

SEEN: tuple[Combination, ...] = tuple(c for c in _ALL if not is_held_out(c))
"""Combinations that every other split renders."""
