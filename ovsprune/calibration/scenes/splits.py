"""Splits of the procedural scenes: disjoint ranges of scene numbers."""

from __future__ import annotations

from typing import NamedTuple

from ovsprune.core.errors import DataError

_RANGE = 1_000_000


class Split(NamedTuple):
    """Range of scene numbers.

    Attributes:
        start: number of the first scene.
        scenes: number of scenes.
        held_out: True if all objects are of held-out combinations; False if none is.
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
"""All splits; ``combinations`` is a second test split."""


def scene_entropy(index: int, split: str, seed: int, size: int) -> tuple[int, int]:
    """Return the seed and the number of a scene, which is unique over all splits.

    Both seed the random generator of the scene. The size, in pixels, is only checked.

    Raises:
        DataError: An argument is out of range.
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
