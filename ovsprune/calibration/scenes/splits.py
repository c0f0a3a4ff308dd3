"""Splits of the procedural scenes: disjoint ranges of scene numbers."""

from __future__ import annotations

from typing import NamedTuple

from ovsprune.core.errors import DataError

_RANGE = 1_000_000


class Split(NamedTuple):
    """A range of scene numbers.

    Attributes:
        start: the number of the split's first scene.
        scenes: how many it has.
        held_out: whether its objects are all of the held-out combinations (else none is).
    """

    start: int
    scenes: int
    held_out: bool


SPLITS: dict[str, Split] = {
    "train": Split(0 * _RANGE, _RANGE, False),
    "val": Split(1 * _RANGE, _RANGE, False),
    "test": Split(2 * _RANGE, _RANGE, False),
    "combinations": Split(3 * _RANGE, _RANGE, True),
    "calibration": Split(4 * _RANGE, _RANGE, False),
}
"""All splits; ``combinations`` is a test split too."""


def scene_entropy(index: int, split: str, seed: int, size: int) -> tuple[int, int]:
    """The numbers that seed a scene.

    Args:
        index: which scene of the split.
        split: a name in `SPLITS`.
        seed: the seed of the data set, not negative.
        size: pixels a side; checked only.

    Returns:
        The seed and the scene's number, which no other split has.

    Raises:
        DataError: if an argument is out of range.
    """
    if split not in SPLITS:
        raise DataError(
            f"unknown split {split!r} of the procedural scenes: use one of {', '.join(SPLITS)}"
        )
    chosen = SPLITS[split]
    if not 0 <= index < chosen.scenes:
        raise DataError(
            f"scene {index} of split {split!r} does not exist: give an index from 0 to "
            f"{chosen.scenes - 1}"
        )
    if seed < 0:
        raise DataError(f"seed {seed} for procedural scenes is negative: give 0 or more")
    if size < 16:
        raise DataError(f"size {size} for procedural scenes is too small: give at least 16 pixels")
    return seed, chosen.start + index
