"""Textures of grounds and skies, as functions of coordinates in 0..1.

The order of the random draws is part of the data set: changing it changes every scene.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float32]
Texture = Callable[[Array, Array, int, np.random.Generator], Array]


@lru_cache(maxsize=8)
def grid(size: int) -> tuple[Array, Array]:
    """Return the pixel centres y [size, 1] and x [1, size] of a square image, in 0..1."""
    line = ((np.arange(size) + 0.5) / size).astype(np.float32)
    return line[:, None], line[None, :]


def blobs(rng: np.random.Generator, size: int, cells: int, tall: int | None = None) -> Array:
    """Return smooth noise [size, size] in -1..1, from a grid of ``cells`` by ``tall`` numbers.

    The same numbers are drawn at every size.
    """
    small = rng.uniform(-1.0, 1.0, (tall or cells, cells)).astype(np.float32)
    image = Image.fromarray(small).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.float32)


def _paint(base: tuple[int, int, int], tone: Array) -> Array:
    """Multiply a colour by a tone [size, size]; returns [size, size, 3]."""
    return np.array(base, dtype=np.float32) * tone[..., None]


def _mix(first: Array, second: Array, share: Array) -> Array:
    """Interpolate linearly between two images by a share [size, size] in 0..1."""
    return first + (second - first) * share[..., None]


def _grass(y: Array, x: Array, size: int, rng: np.random.Generator) -> Array:
    blades = blobs(rng, size, 56, 20)
    patches = blobs(rng, size, 6)
    return _paint((84, 150, 52), 1.0 + 0.2 * blades + 0.1 * patches)


def _sand(y: Array, x: Array, size: int, rng: np.random.Generator) -> Array:
    phase = rng.uniform(0.0, 6.28)
    ripples = np.sin(70.0 * y + 2.0 * np.sin(9.0 * x + phase) + phase)
    return _paint((216, 188, 132), 1.0 + 0.07 * ripples + 0.1 * blobs(rng, size, 48))


def _water(y: Array, x: Array, size: int, rng: np.random.Generator) -> Array:
    phase = rng.uniform(0.0, 6.28)
    waves = np.sin(55.0 * y + 3.0 * np.sin(12.0 * x + phase) + 3.0 * blobs(rng, size, 5))
    return _paint((34, 118, 148), 1.0 + 0.13 * waves) + 12.0 * y[..., None]


def _road(y: Array, x: Array, size: int, rng: np.random.Generator) -> Array:
    base = _paint((104, 104, 108), 1.0 + 0.1 * blobs(rng, size, 56))
    line, phase = rng.uniform(0.7, 0.95), rng.uniform(0.0, 1.0)
    dashes = (np.abs(y - line) < 0.015) & (((x * 4.0 + phase) % 1.0) < 0.6)
    base[dashes] = (228, 224, 200)
    return base


def _snow(y: Array, x: Array, size: int, rng: np.random.Generator) -> Array:
    return _paint((226, 234, 246), 0.98 + 0.07 * blobs(rng, size, 5) + 0.03 * blobs(rng, size, 40))


def _bricks(y: Array, x: Array, size: int, rng: np.random.Generator) -> Array:
    rows = y * 14.0 + rng.uniform(0.0, 1.0)
    across = x * 7.0 + 0.5 * (np.floor(rows) % 2) + rng.uniform(0.0, 1.0)
    mortar = ((rows % 1.0) < 0.16) | ((across % 1.0) < 0.09)
    base = _paint((158, 88, 66), 1.0 + 0.12 * blobs(rng, size, 14))
    base[mortar] = (182, 136, 118)
    return base


def _blue_sky(y: Array, x: Array, size: int, rng: np.random.Generator) -> Array:
    base = _paint((112, 176, 236), 0.92 + 0.25 * y + 0.0 * x)
    clouds = np.clip(blobs(rng, size, 6, 9) * 1.6 - 0.5, 0.0, 0.8)
    return _mix(base, np.full_like(base, 246.0), clouds)


def _night_sky(y: Array, x: Array, size: int, rng: np.random.Generator) -> Array:
    base = _paint((20, 24, 66), 0.85 + 0.8 * y + 0.1 * blobs(rng, size, 5))
    for sx, sy, bright in rng.uniform(0.0, 1.0, (36, 3)):
        top, left = int(sy * size), int(sx * size)
        side = max(1, size // 112)
        base[top : top + side, left : left + side] = 150.0 + 100.0 * bright
    return base


def _sunset(y: Array, x: Array, size: int, rng: np.random.Generator) -> Array:
    share = np.clip(1.7 * y + 0.12 * blobs(rng, size, 4, 8), 0.0, 1.0)
    top = np.full((size, size, 3), (122, 62, 128), dtype=np.float32)
    low = np.full((size, size, 3), (252, 158, 84), dtype=np.float32)
    return _mix(top, low, share)


def _storm(y: Array, x: Array, size: int, rng: np.random.Generator) -> Array:
    billows: Array = 0.2 * blobs(rng, size, 4, 6) + 0.16 * blobs(rng, size, 10, 14)
    return _paint((132, 138, 150), 0.95 + billows)


TEXTURES: dict[str, Texture] = {
    "grass": _grass,
    "sand": _sand,
    "water": _water,
    "road": _road,
    "snow": _snow,
    "brick floor": _bricks,
    "blue sky": _blue_sky,
    "night sky": _night_sky,
    "sunset": _sunset,
    "storm clouds": _storm,
}
"""Map of background class to a function (y, x, size, rng) that returns sRGB [size, size, 3]."""
