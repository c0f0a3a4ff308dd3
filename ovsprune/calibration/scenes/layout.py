"""Layout of a scene: its objects and background, drawn at random before rendering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ovsprune.calibration.scenes.splits import SPLITS
from ovsprune.calibration.scenes.vocabulary import GROUNDS, HELD_OUT, SEEN, SKIES, Combination

_MIN_WIDTH, _MAX_WIDTH = 0.32, 0.62
"""Range of object widths, in 0..1 of the side."""
_CAPTION_STARTS = ("", "a photo of ", "a picture of ", "a scene with ")


@dataclass(frozen=True)
class Placement:
    """Position and appearance of an object.

    Attributes:
        combination: colour, material and shape.
        x: horizontal centre, in 0..1 of the side.
        y: vertical centre from the top, in 0..1 of the side.
        radius: half the object's width, in 0..1 of the side.
        angle: rotation in radians.
        stretch: width divided by height.
        jitter: three numbers in -1..1 that vary the surface, see ``materials.paint``.
    """

    combination: Combination
    x: float
    y: float
    radius: float
    angle: float
    stretch: float
    jitter: tuple[float, float, float]


@dataclass(frozen=True)
class Layout:
    """Random parameters of a scene, except the texture noise.

    Attributes:
        sky: name of the sky, or None if the ground fills the image.
        ground: name of the ground, or None if the sky fills the image.
        horizon: height of the horizon from the top, in 0..1.
        hilly: amplitude of the horizon's waves, in 0..1.
        phase: phase of the horizon's waves, in radians.
        light: direction of the light, a unit vector.
        gain: brightness factor of each channel, around 1.
        noise: standard deviation of the pixel noise, in 0..255.
        placements: the objects from back to front.
        wording: number in 0..1 that selects the beginning of the caption.
    """

    sky: str | None
    ground: str | None
    horizon: float
    hilly: float
    phase: float
    light: tuple[float, float]
    gain: tuple[float, float, float]
    noise: float
    placements: tuple[Placement, ...]
    wording: float

    @property
    def backgrounds(self) -> tuple[str, ...]:
        """Names of the sky and the ground in the image, sky first."""
        return tuple(name for name in (self.sky, self.ground) if name is not None)

    def caption(self, seen: Sequence[Combination], areas: Sequence[int]) -> str:
        """Return a sentence that names up to two of the largest objects and the background.

        For example ``"a photo of a red striped mug and a blue plain key on sand"``.

        Args:
            seen: the visible objects.
            areas: number of visible pixels of each.
        """
        order = sorted(range(len(seen)), key=lambda i: -areas[i])[:2]
        things = " and ".join(_with_article(seen[i].phrase) for i in order) or "nothing"
        start = _CAPTION_STARTS[int(self.wording * len(_CAPTION_STARTS))]
        ground = f" on {self.ground}" if self.ground else ""
        sky = f" under {self.sky}" if self.sky else ""
        return f"{start}{things}{ground}{sky}"


def _with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def draw_layout(rng: np.random.Generator, split: str) -> Layout:
    """Draw the layout of a scene with two to four objects, of the combinations of a split."""
    combinations = HELD_OUT if SPLITS[split].held_out else SEEN
    sky: str | None = SKIES[rng.integers(len(SKIES))]
    ground: str | None = GROUNDS[rng.integers(len(GROUNDS))]
    kind = rng.random()
    if kind < 0.12:
        sky = None
    elif kind < 0.2:
        ground = None
    light = rng.uniform(0.0, 2.0 * np.pi)
    warmth, level = rng.uniform(-0.06, 0.06), rng.uniform(0.78, 1.12)
    return Layout(
        sky=sky,
        ground=ground,
        horizon=rng.uniform(0.3, 0.68),
        hilly=rng.uniform(0.0, 1.0),
        phase=rng.uniform(0.0, 2.0 * np.pi),
        light=(float(np.cos(light)), float(np.sin(light))),
        gain=(level * (1.0 + warmth), level, level * (1.0 - warmth)),
        noise=rng.uniform(2.0, 5.0),
        placements=_place(rng, combinations),
        wording=rng.random(),
    )


def _place(rng: np.random.Generator, combinations: Sequence[Combination]) -> tuple[Placement, ...]:
    """Draw two to four objects, from large (back) to small (front)."""
    count = int(rng.integers(2, 5))
    widths = np.exp(rng.uniform(np.log(_MIN_WIDTH), np.log(_MAX_WIDTH), count))
    widths = np.sort(widths)[::-1] * (1.0 if count < 4 else 0.9)
    placed: list[Placement] = []
    for width in widths:
        radius = float(width) / 2.0
        x, y = _free_position(rng, radius, placed)
        tint, scale, phase = rng.uniform(-1.0, 1.0, 3)
        placed.append(
            Placement(
                combination=combinations[int(rng.integers(len(combinations)))],
                x=x,
                y=y,
                radius=radius,
                angle=float(np.radians(rng.uniform(-12.0, 12.0))),
                stretch=rng.uniform(0.82, 1.0),
                jitter=(float(tint), float(scale), float(phase)),
            )
        )
    return tuple(placed)


def _free_position(
    rng: np.random.Generator, radius: float, placed: Sequence[Placement]
) -> tuple[float, float]:
    """Return the least crowded of eight random positions, so that no object is covered entirely."""
    best, best_gap = (0.5, 0.5), -np.inf
    for x, y in rng.uniform(0.12, 0.88, (8, 2)):
        gap = min((np.hypot(x - p.x, y - p.y) / (radius + p.radius) for p in placed), default=9.0)
        if gap > best_gap:
            best, best_gap = (float(x), float(y)), gap
        if gap > 0.95:
            break
    return best
