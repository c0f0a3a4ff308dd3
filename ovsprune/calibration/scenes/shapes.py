"""Silhouettes of the object classes: polygons in the square from -1 to 1 (y points down)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Mode = Literal["add", "cut", "mark"]


class Part(NamedTuple):
    """Polygon of a shape.

    Attributes:
        points: corners [n, 2], x and y in -1..1.
        mode: ``add`` belongs to the silhouette, ``cut`` is a hole in it, ``mark`` is painted
            on it in a second tone.
    """

    points: Points
    mode: Mode


def _poly(*xy: tuple[float, float], mode: Mode = "add") -> Part:
    return Part(np.array(xy, dtype=np.float64), mode)


def _rect(x0: float, y0: float, x1: float, y1: float, mode: Mode = "add") -> Part:
    return _poly((x0, y0), (x1, y0), (x1, y1), (x0, y1), mode=mode)


def _oval(
    cx: float,
    cy: float,
    rx: float,
    ry: float,
    mode: Mode = "add",
    start: float = 0.0,
    stop: float = 360.0,
    turn: float = 0.0,
) -> Part:
    """Return an ellipse, or its segment between two angles in degrees (clockwise from +x)."""
    a = np.radians(np.linspace(start, stop, 24))
    x, y = rx * np.cos(a), ry * np.sin(a)
    c, s = np.cos(np.radians(turn)), np.sin(np.radians(turn))
    return Part(np.stack([cx + c * x - s * y, cy + s * x + c * y], axis=1), mode)


def _star(points: int, inner: float) -> Part:
    a = np.radians(np.arange(2 * points) * 180.0 / points - 90.0)
    r = np.where(np.arange(2 * points) % 2 == 0, 1.0, inner)
    return Part(np.stack([r * np.cos(a), r * np.sin(a)], axis=1), "add")


def _heart() -> Part:
    t = np.linspace(0.0, 2.0 * np.pi, 32)
    x = np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16.0
    return Part(np.stack([x, y - 0.06], axis=1), "add")


def _leaf_blade() -> Part:
    t = np.linspace(-1.0, 1.0, 16)
    bulge = 0.52 * (1 - t**2) ** 0.7
    upper = np.stack([t * 0.8 + 0.15, -bulge], axis=1)
    lower = np.stack([t[::-1] * 0.8 + 0.15, bulge[::-1]], axis=1)
    return Part(np.concatenate([upper, lower]), "add")


def _petal(degrees: float) -> Part:
    a = np.radians(degrees)
    return _oval(0.58 * np.cos(a), 0.58 * np.sin(a), 0.36, 0.27, turn=degrees)


SHAPES: dict[str, tuple[Part, ...]] = {
    "ball": (_oval(0, 0, 0.9, 0.9), _oval(0, 0, 0.9, 0.16, "mark", turn=-20)),
    "star": (_star(5, 0.42),),
    "heart": (_heart(),),
    "moon": (_oval(0, 0, 0.95, 0.95), _oval(0.45, -0.1, 0.78, 0.78, "cut")),
    "ring": (_oval(0, 0, 0.95, 0.95), _oval(0, 0, 0.52, 0.52, "cut")),
    "cross": (_rect(-0.3, -0.95, 0.3, 0.95), _rect(-0.95, -0.3, 0.95, 0.3)),
    "arrow": (_rect(-0.95, -0.24, 0.2, 0.24), _poly((0.1, -0.75), (0.98, 0.0), (0.1, 0.75))),
    "mug": (
        _oval(0.5, 0.0, 0.48, 0.5),
        _oval(0.5, 0.0, 0.26, 0.28, "cut"),
        _rect(-0.85, -0.75, 0.5, 0.8),
        _rect(-0.85, -0.75, 0.5, -0.55, "mark"),
    ),
    "house": (
        _rect(-0.75, -0.15, 0.75, 0.9),
        _rect(0.35, -0.85, 0.6, -0.2),
        _poly((-0.98, -0.1), (0.0, -0.95), (0.98, -0.1)),
        _rect(-0.2, 0.3, 0.2, 0.9, "mark"),
        _rect(0.38, 0.1, 0.62, 0.4, "mark"),
    ),
    "tree": (
        _rect(-0.17, 0.4, 0.17, 0.98),
        *(
            _poly((0.0, top), (half, bottom), (-half, bottom))
            for top, bottom, half in ((-0.98, -0.3, 0.5), (-0.6, 0.15, 0.65), (-0.2, 0.6, 0.82))
        ),
    ),
    "fish": (
        _oval(0.15, 0.0, 0.8, 0.48),
        _poly((-0.45, 0.0), (-0.98, -0.55), (-0.98, 0.55)),
        _poly((-0.1, -0.35), (0.3, -0.8), (0.4, -0.3)),
        _oval(0.62, -0.12, 0.1, 0.1, "mark"),
    ),
    "bird": (
        _oval(-0.05, 0.2, 0.62, 0.42, turn=-15),
        _oval(0.5, -0.3, 0.3, 0.3),
        _poly((0.7, -0.42), (1.0, -0.2), (0.7, -0.15)),
        _poly((-0.5, 0.15), (-1.0, 0.1), (-0.95, 0.55), (-0.45, 0.5)),
        _poly((-0.1, 0.6), (-0.02, 0.6), (0.06, 0.98), (-0.1, 0.98)),
        _poly((0.2, 0.55), (0.28, 0.55), (0.36, 0.98), (0.2, 0.98)),
        _oval(-0.15, 0.15, 0.38, 0.2, "mark", turn=-25),
    ),
    "car": (
        _rect(-0.98, -0.1, 0.98, 0.4),
        _poly((-0.6, -0.1), (-0.4, -0.6), (0.35, -0.6), (0.65, -0.1)),
        _oval(-0.52, 0.42, 0.26, 0.26),
        _oval(0.52, 0.42, 0.26, 0.26),
        _poly((-0.42, -0.12), (-0.3, -0.47), (-0.02, -0.47), (-0.02, -0.12), mode="mark"),
        _poly((0.08, -0.12), (0.08, -0.47), (0.3, -0.47), (0.48, -0.12), mode="mark"),
        _oval(-0.52, 0.42, 0.15, 0.15, "mark"),
        _oval(0.52, 0.42, 0.15, 0.15, "mark"),
    ),
    "boat": (
        _poly((-0.98, 0.35), (0.98, 0.35), (0.6, 0.85), (-0.6, 0.85)),
        _rect(-0.08, -0.95, 0.06, 0.4),
        _poly((0.14, -0.9), (0.85, 0.22), (0.14, 0.22)),
        _poly((-0.16, -0.6), (-0.7, 0.22), (-0.16, 0.22)),
    ),
    "mushroom": (
        _oval(0, 0.1, 0.95, 0.95, start=180, stop=360),
        _poly((-0.25, 0.05), (0.25, 0.05), (0.36, 0.92), (-0.36, 0.92)),
    ),
    "bottle": (
        _rect(-0.17, -0.95, 0.17, -0.2),
        _oval(0, -0.05, 0.45, 0.38),
        _rect(-0.45, -0.05, 0.45, 0.95),
        _rect(-0.45, 0.2, 0.45, 0.6, "mark"),
    ),
    "flower": (
        *(_petal(60.0 * k) for k in range(6)),
        _oval(0, 0, 0.3, 0.3),
        _oval(0, 0, 0.22, 0.22, "mark"),
    ),
    "leaf": (
        _leaf_blade(),
        _rect(-0.98, -0.07, -0.55, 0.07),
        _rect(-0.6, -0.05, 0.7, 0.05, "mark"),
    ),
    "bell": (
        _oval(0, -0.25, 0.5, 0.55),
        _poly((-0.5, -0.25), (0.5, -0.25), (0.62, 0.3), (0.92, 0.62), (-0.92, 0.62), (-0.62, 0.3)),
        _oval(0, 0.72, 0.22, 0.24),
        _rect(-0.75, 0.36, 0.75, 0.46, "mark"),
    ),
    "butterfly": (
        _oval(-0.55, -0.38, 0.46, 0.42, turn=35),
        _oval(-0.45, 0.42, 0.36, 0.34, turn=-35),
        _oval(0.55, -0.38, 0.46, 0.42, turn=-35),
        _oval(0.45, 0.42, 0.36, 0.34, turn=35),
        _oval(0, 0, 0.13, 0.72),
        _oval(0, 0, 0.09, 0.6, "mark"),
    ),
    "snowman": (
        _oval(0, 0.5, 0.55, 0.48),
        _oval(0, -0.2, 0.4, 0.36),
        _oval(0, -0.64, 0.27, 0.26),
        _rect(-0.36, -0.86, 0.36, -0.76),
        _rect(-0.22, -1.0, 0.22, -0.8),
        *(_oval(0, y, 0.08, 0.08, "mark") for y in (-0.25, 0.3, 0.6)),
    ),
    "rocket": (
        _poly((0.0, -1.0), (0.32, -0.45), (0.32, 0.55), (-0.32, 0.55), (-0.32, -0.45)),
        _poly((0.3, 0.05), (0.75, 0.75), (0.3, 0.55)),
        _poly((-0.3, 0.05), (-0.75, 0.75), (-0.3, 0.55)),
        _poly((-0.2, 0.5), (0.2, 0.5), (0.0, 0.98)),
        _oval(0, -0.2, 0.17, 0.17, "mark"),
    ),
    "cactus": (
        _rect(-0.2, -0.8, 0.2, 0.98),
        _oval(0, -0.8, 0.2, 0.18),
        _rect(-0.75, 0.1, -0.1, 0.38),
        _rect(-0.75, -0.4, -0.47, 0.3),
        _rect(0.1, -0.15, 0.72, 0.13),
        _rect(0.46, -0.62, 0.72, 0.1),
    ),
    "crown": (
        _poly(
            (-0.85, 0.7),
            (-0.98, -0.5),
            (-0.45, 0.05),
            (0, -0.75),
            (0.45, 0.05),
            (0.98, -0.5),
            (0.85, 0.7),
        ),
        _rect(-0.85, 0.36, 0.85, 0.5, "mark"),
    ),
}
"""Map of object class to its parts, in drawing order."""
