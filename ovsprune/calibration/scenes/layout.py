"""What is in a scene and where, drawn before any pixel is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ovsprune.calibration.scenes.splits import SPLITS
from ovsprune.calibration.scenes.vocabulary import GROUNDS, HELD_OUT, SEEN, SKIES, Combination

_SMALLEST, _LARGEST = 0.32, 0.62
_CAPTION_STARTS = ("", "a photo of ", "a picture of ", "a scene with ")


@dataclass(frozen=True)
class Placement:
    """Where and how an object stands.

    Attributes:
        combination: colour, material and shape.
        x: centre across, in 0..1 of the side.
        y: centre down, in 0..1 of the side.
        radius: half the object's width, in 0..1 of the side.
        angle: turn in radians.
        stretch: width over height.
        jitter: three numbers in -1..1 for the surface.
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
    """All that is random about a scene but its texture noise.

    Attributes:
        sky: the sky's name, or None where the ground fills the picture.
        ground: the ground's name, or None where the sky fills the picture.
        horizon: height of the horizon from the top, in 0..1.
        hilly: how wavy the horizon is, in 0..1.
        phase: where the horizon's wave starts, in radians.
        light: direction of the light, a unit vector.
        gain: lighting of each channel, around 1.
        noise: standard deviation of the pixel noise, in 0..255.
        placements: the objects from back to front.
        wording: picks the caption's form, in 0..1.
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
        """The names of the sky and the ground that are in the picture, sky first."""
        return tuple(name for name in (self.sky, self.ground) if name is not None)

    def caption(self, seen: Sequence[Combination], areas: Sequence[int]) -> str:
        """A sentence that names the up to two largest objects and the surroundings.

        Args:
            seen: the visible objects.
            areas: their visible pixels.

        Returns:
            Such as ``"a photo of a red striped mug and a blue plain key on sand"``.
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
    """Draws what is in a scene.

    Args:
        rng: source of randomness.
        split: a name in `SPLITS`; says which combinations may occur.

    Returns:
        The layout, with two to four objects.
    """
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
    count = int(rng.integers(2, 5))
    widths = np.exp(rng.uniform(np.log(_SMALLEST), np.log(_LARGEST), count))
    widths = np.sort(widths)[::-1] * (1.0 if count < 4 else 0.9)
    placed: list[Placement] = []
    for width in widths:
        radius = float(width) / 2.0
        x, y = _free_place(rng, radius, placed)
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


def _free_place(
    rng: np.random.Generator, radius: float, placed: Sequence[Placement]
) -> tuple[float, float]:
    """The least crowded of a few random places, so that objects overlap but not entirely."""
    best, best_gap = (0.5, 0.5), -np.inf
    for x, y in rng.uniform(0.12, 0.88, (8, 2)):
        gap = min((np.hypot(x - p.x, y - p.y) / (radius + p.radius) for p in placed), default=9.0)
        if gap > best_gap:
            best, best_gap = (float(x), float(y)), gap
        if gap > 0.95:
            break
    return best
