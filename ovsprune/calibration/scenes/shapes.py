"""Silhouettes of the object classes: polygons in the square from -1 to 1 (y points down)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Mode = Literal["add", "cut", "mark"]


class Part(NamedTuple):
    """A polygon of a shape.

    Attributes:
        points: corners, shape (n, 2), x and y in -1..1.
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


def _moon() -> Iterable[Part]:
    yield _oval(0, 0, 0.95, 0.95)
    yield _oval(0.45, -0.1, 0.78, 0.78, "cut")


def _ring() -> Iterable[Part]:
    yield _oval(0, 0, 0.95, 0.95)
    yield _oval(0, 0, 0.52, 0.52, "cut")


def _cross() -> Iterable[Part]:
    yield _rect(-0.3, -0.95, 0.3, 0.95)
    yield _rect(-0.95, -0.3, 0.95, 0.3)


def _arrow() -> Iterable[Part]:
    yield _rect(-0.95, -0.24, 0.2, 0.24)
    yield _poly((0.1, -0.75), (0.98, 0.0), (0.1, 0.75))


def _mug() -> Iterable[Part]:
    yield _oval(0.5, 0.0, 0.48, 0.5)
    yield _oval(0.5, 0.0, 0.26, 0.28, "cut")
    yield _rect(-0.85, -0.75, 0.5, 0.8)
    yield _rect(-0.85, -0.75, 0.5, -0.55, "mark")


def _house() -> Iterable[Part]:
    yield _rect(-0.75, -0.15, 0.75, 0.9)
    yield _rect(0.35, -0.85, 0.6, -0.2)
    yield _poly((-0.98, -0.1), (0.0, -0.95), (0.98, -0.1))
    yield _rect(-0.2, 0.3, 0.2, 0.9, "mark")
    yield _rect(0.38, 0.1, 0.62, 0.4, "mark")


def _tree() -> Iterable[Part]:
    yield _rect(-0.17, 0.4, 0.17, 0.98)
    for top, bottom, half in ((-0.98, -0.3, 0.5), (-0.6, 0.15, 0.65), (-0.2, 0.6, 0.82)):
        yield _poly((0.0, top), (half, bottom), (-half, bottom))


def _fish() -> Iterable[Part]:
    yield _oval(0.15, 0.0, 0.8, 0.48)
    yield _poly((-0.45, 0.0), (-0.98, -0.55), (-0.98, 0.55))
    yield _poly((-0.1, -0.35), (0.3, -0.8), (0.4, -0.3))
    yield _oval(0.62, -0.12, 0.1, 0.1, "mark")


def _bird() -> Iterable[Part]:
    yield _oval(-0.05, 0.2, 0.62, 0.42, turn=-15)
    yield _oval(0.5, -0.3, 0.3, 0.3)
    yield _poly((0.7, -0.42), (1.0, -0.2), (0.7, -0.15))
    yield _poly((-0.5, 0.15), (-1.0, 0.1), (-0.95, 0.55), (-0.45, 0.5))
    yield _poly((-0.1, 0.6), (-0.02, 0.6), (0.06, 0.98), (-0.1, 0.98))
    yield _poly((0.2, 0.55), (0.28, 0.55), (0.36, 0.98), (0.2, 0.98))
    yield _oval(-0.15, 0.15, 0.38, 0.2, "mark", turn=-25)


def _car() -> Iterable[Part]:
    yield _rect(-0.98, -0.1, 0.98, 0.4)
    yield _poly((-0.6, -0.1), (-0.4, -0.6), (0.35, -0.6), (0.65, -0.1))
    yield _oval(-0.52, 0.42, 0.26, 0.26)
    yield _oval(0.52, 0.42, 0.26, 0.26)
    yield _poly((-0.42, -0.12), (-0.3, -0.47), (-0.02, -0.47), (-0.02, -0.12), mode="mark")
    yield _poly((0.08, -0.12), (0.08, -0.47), (0.3, -0.47), (0.48, -0.12), mode="mark")
    yield _oval(-0.52, 0.42, 0.15, 0.15, "mark")
    yield _oval(0.52, 0.42, 0.15, 0.15, "mark")


def _boat() -> Iterable[Part]:
    yield _poly((-0.98, 0.35), (0.98, 0.35), (0.6, 0.85), (-0.6, 0.85))
    yield _rect(-0.08, -0.95, 0.06, 0.4)
    yield _poly((0.14, -0.9), (0.85, 0.22), (0.14, 0.22))
    yield _poly((-0.16, -0.6), (-0.7, 0.22), (-0.16, 0.22))


def _mushroom() -> Iterable[Part]:
    yield _oval(0, 0.1, 0.95, 0.95, start=180, stop=360)
    yield _poly((-0.25, 0.05), (0.25, 0.05), (0.36, 0.92), (-0.36, 0.92))


def _bottle() -> Iterable[Part]:
    yield _rect(-0.17, -0.95, 0.17, -0.2)
    yield _oval(0, -0.05, 0.45, 0.38)
    yield _rect(-0.45, -0.05, 0.45, 0.95)
    yield _rect(-0.45, 0.2, 0.45, 0.6, "mark")


def _flower() -> Iterable[Part]:
    for k in range(6):
        a = np.radians(60.0 * k)
        yield _oval(0.58 * np.cos(a), 0.58 * np.sin(a), 0.36, 0.27, turn=60.0 * k)
    yield _oval(0, 0, 0.3, 0.3)
    yield _oval(0, 0, 0.22, 0.22, "mark")


def _leaf() -> Iterable[Part]:
    t = np.linspace(-1.0, 1.0, 16)
    bulge = 0.52 * (1 - t**2) ** 0.7
    upper = np.stack([t * 0.8 + 0.15, -bulge], axis=1)
    lower = np.stack([t[::-1] * 0.8 + 0.15, bulge[::-1]], axis=1)
    yield Part(np.concatenate([upper, lower]), "add")
    yield _rect(-0.98, -0.07, -0.55, 0.07)
    yield _rect(-0.6, -0.05, 0.7, 0.05, "mark")


def _bell() -> Iterable[Part]:
    yield _oval(0, -0.25, 0.5, 0.55)
    yield _poly((-0.5, -0.25), (0.5, -0.25), (0.62, 0.3), (0.92, 0.62), (-0.92, 0.62), (-0.62, 0.3))
    yield _oval(0, 0.72, 0.22, 0.24)
    yield _rect(-0.75, 0.36, 0.75, 0.46, "mark")


def _butterfly() -> Iterable[Part]:
    for side in (-1.0, 1.0):
        yield _oval(side * 0.55, -0.38, 0.46, 0.42, turn=side * -35)
        yield _oval(side * 0.45, 0.42, 0.36, 0.34, turn=side * 35)
    yield _oval(0, 0, 0.13, 0.72)
    yield _oval(0, 0, 0.09, 0.6, "mark")


def _snowman() -> Iterable[Part]:
    yield _oval(0, 0.5, 0.55, 0.48)
    yield _oval(0, -0.2, 0.4, 0.36)
    yield _oval(0, -0.64, 0.27, 0.26)
    yield _rect(-0.36, -0.86, 0.36, -0.76)
    yield _rect(-0.22, -1.0, 0.22, -0.8)
    for y in (-0.25, 0.3, 0.6):
        yield _oval(0, y, 0.08, 0.08, "mark")


def _rocket() -> Iterable[Part]:
    yield _poly((0.0, -1.0), (0.32, -0.45), (0.32, 0.55), (-0.32, 0.55), (-0.32, -0.45))
    yield _poly((0.3, 0.05), (0.75, 0.75), (0.3, 0.55))
    yield _poly((-0.3, 0.05), (-0.75, 0.75), (-0.3, 0.55))
    yield _poly((-0.2, 0.5), (0.2, 0.5), (0.0, 0.98))
    yield _oval(0, -0.2, 0.17, 0.17, "mark")


def _cactus() -> Iterable[Part]:
    yield _rect(-0.2, -0.8, 0.2, 0.98)
    yield _oval(0, -0.8, 0.2, 0.18)
    yield _rect(-0.75, 0.1, -0.1, 0.38)
    yield _rect(-0.75, -0.4, -0.47, 0.3)
    yield _rect(0.1, -0.15, 0.72, 0.13)
    yield _rect(0.46, -0.62, 0.72, 0.1)


def _crown() -> Iterable[Part]:
    yield _poly(
        (-0.85, 0.7),
        (-0.98, -0.5),
        (-0.45, 0.05),
        (0, -0.75),
        (0.45, 0.05),
        (0.98, -0.5),
        (0.85, 0.7),
    )
    yield _rect(-0.85, 0.36, 0.85, 0.5, "mark")


_MAKERS: dict[str, Callable[[], Iterable[Part]]] = {
    "ball": lambda: [_oval(0, 0, 0.9, 0.9), _oval(0, 0, 0.9, 0.16, "mark", turn=-20)],
    "star": lambda: [_star(5, 0.42)],
    "heart": lambda: [_heart()],
    "moon": _moon,
    "ring": _ring,
    "cross": _cross,
    "arrow": _arrow,
    "mug": _mug,
    "house": _house,
    "tree": _tree,
    "fish": _fish,
    "bird": _bird,
    "car": _car,
    "boat": _boat,
    "mushroom": _mushroom,
    "bottle": _bottle,
    "flower": _flower,
    "leaf": _leaf,
    "bell": _bell,
    "butterfly": _butterfly,
    "snowman": _snowman,
    "rocket": _rocket,
    "cactus": _cactus,
    "crown": _crown,
}

SHAPES: dict[str, tuple[Part, ...]] = {name: tuple(make()) for name, make in _MAKERS.items()}
"""Map of object class to its parts, in drawing order."""
