"""Procedural scenes: rendered images with captions, pixel labels and objects, made from a seed.

The scenes train and test the embedded model ``tiny``, serve as calibration images if no others are
given, and illustrate the demo. They need numpy and Pillow only.

    >>> from ovsprune.calibration.scenes import CLASS_NAMES, render_scene
    >>> scene = render_scene(0, split="test")
    >>> scene.image.shape, scene.labels.shape
    ((96, 96, 3), (96, 96))
    >>> len(CLASS_NAMES)
    34
"""

from ovsprune.calibration.scenes.render import Scene, SceneObject, render_scene
from ovsprune.calibration.scenes.splits import SPLITS, Split
from ovsprune.calibration.scenes.vocabulary import (
    CLASS_NAMES,
    COLOURS,
    GROUNDS,
    HELD_OUT,
    MATERIALS,
    OBJECTS,
    SEEN,
    SKIES,
    Combination,
    is_held_out,
)

__all__ = [
    "CLASS_NAMES",
    "COLOURS",
    "GROUNDS",
    "HELD_OUT",
    "MATERIALS",
    "OBJECTS",
    "SEEN",
    "SKIES",
    "SPLITS",
    "Combination",
    "Scene",
    "SceneObject",
    "Split",
    "is_held_out",
    "render_scene",
]
