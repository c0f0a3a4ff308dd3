"""Surfaces of the objects: pixels from a colour and a material."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ovsprune.calibration.scenes.vocabulary import COLOURS

Array = NDArray[np.float32]


def _second_tone(colour: Array) -> Array:
    """Return the tone [3] of stripes, dots and marks: lighter on dark colours, else darker."""
    luma = float(colour @ np.array((0.299, 0.587, 0.114), dtype=np.float32))
    return colour * 0.5 if luma > 110.0 else colour * 0.5 + 120.0


def paint(
    colour: str,
    material: str,
    u: Array,
    v: Array,
    mark: Array,
    light: tuple[float, float],
    jitter: tuple[float, float, float],
) -> Array:
    """Compute the pixels of one object.

    Args:
        colour: a name in `COLOURS`.
        material: a name in `MATERIALS`.
        u: horizontal coordinate in the object, [h, w], in 1/112 of the image's side.
        v: vertical coordinate in the object, [h, w], in the same units.
        mark: coverage of the marks, [h, w], in 0..1.
        light: direction of the light, a unit vector in u and v.
        jitter: three numbers in -1..1: hue and brightness, texture scale, texture phase.

    Returns:
        sRGB [h, w, 3], in 0..255 before clipping.
    """
    tint, scale, phase = jitter
    base = np.array(COLOURS[colour], dtype=np.float32) * (1.0 + 0.1 * tint)
    other = _second_tone(base)
    wave = 1.0 + 0.15 * scale
    slope = np.float32(0.006) * (u * light[0] + v * light[1])
    share = np.zeros_like(u)
    tone = 1.0 + np.clip(slope, -0.2, 0.2)
    if material == "striped":
        share = (np.sin((u * 0.9 + v * 0.4) * 0.95 / wave + 3.0 * phase) > 0.1).astype(np.float32)
    elif material == "dotted":
        cell = 6.5 * wave
        du = (u / cell + phase) % 1.0 - 0.5
        dv = (v / cell + phase) % 1.0 - 0.5
        share = np.clip(3.0 - 9.0 * np.hypot(du, dv), 0.0, 1.0).astype(np.float32)
    elif material == "metallic":
        t = u * light[0] + v * light[1] + 2.0 * phase
        tone = 0.78 + 0.3 * np.sin(t * 0.24 / wave)
        share_white = np.exp(-(((t - 4.0) / 3.0) ** 2))
        base_map = base * tone[..., None]
        shiny = base_map + (250.0 - base_map) * (0.85 * share_white)[..., None]
        return shiny * (1.0 - 0.45 * mark)[..., None]
    surface = base + (other - base) * share[..., None]
    surface = surface + (_second_tone(base) - surface) * (0.75 * mark)[..., None]
    return surface * tone[..., None]
