"""Rendering of one scene: a pure function of seed, index, split and size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ovsprune.calibration.scenes.backgrounds import TEXTURES, grid
from ovsprune.calibration.scenes.layout import Layout, Placement, draw_layout
from ovsprune.calibration.scenes.materials import paint
from ovsprune.calibration.scenes.shapes import SHAPES
from ovsprune.calibration.scenes.splits import scene_entropy
from ovsprune.calibration.scenes.vocabulary import CLASS_NAMES, Combination

Array = NDArray[np.float32]
_SUPERSAMPLE = 3
_OUTLINE = 2.6  # width of the pen in 1/112 of the side; its outer half lies outside the object


@dataclass(frozen=True)
class SceneObject:
    """Object of a scene.

    Attributes:
        combination: colour, material and shape; the shape is the class name.
        class_id: index of the class in `CLASS_NAMES`.
        box: x0, y0, x1, y1 of the visible part, in pixels; x1 and y1 are exclusive.
        area: number of visible pixels.
    """

    combination: Combination
    class_id: int
    box: tuple[int, int, int, int]
    area: int


@dataclass(frozen=True)
class Scene:
    """Rendered scene.

    Attributes:
        image: sRGB, uint8 [size, size, 3].
        labels: class ids, uint8 [size, size]; every pixel has a class.
        instances: uint8 [size, size]: 0 is background, i + 1 is ``objects[i]``.
        objects: the objects with at least one visible pixel, from back to front.
        backgrounds: names of the sky and the ground in the image.
        caption: a sentence about the scene.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    instances: NDArray[np.uint8]
    objects: tuple[SceneObject, ...]
    backgrounds: tuple[str, ...]
    caption: str


def render_scene(index: int, *, split: str = "train", seed: int = 0, size: int = 96) -> Scene:
    """Render a scene; equal arguments give equal pixels.

    The content depends on seed, split and index only; the size changes the resolution.

    Args:
        index: index of the scene in the split, from 0 to a million (exclusive).
        split: a name in `SPLITS`; splits never share a scene.
        seed: seed of the data set.
        size: side in pixels, at least 16.

    Returns:
        The scene.

    Raises:
        DataError: The split is unknown, the index is out of range, or the size is too small.
    """
    entropy = scene_entropy(index, split, seed, size)
    layout_seed, pixel_seed = np.random.SeedSequence(entropy).spawn(2)
    layout = draw_layout(np.random.default_rng(layout_seed), split)
    rng = np.random.default_rng(pixel_seed)
    canvas, labels = _background(layout, size, rng)
    instances = np.zeros((size, size), dtype=np.uint8)
    for number, placement in enumerate(layout.placements, start=1):
        _draw(placement, layout.light, canvas, instances, number)
    labels, instances, objects = _visible(layout, labels, instances)
    gain = np.array(layout.gain, dtype=np.float32)
    noise = rng.standard_normal((size, size, 3), dtype=np.float32) * layout.noise
    image = np.clip(canvas * gain + noise, 0.0, 255.0).astype(np.uint8)
    caption = layout.caption([o.combination for o in objects], [o.area for o in objects])
    return Scene(
        image=image,
        labels=labels,
        instances=instances,
        objects=objects,
        backgrounds=layout.backgrounds,
        caption=caption,
    )


def _background(
    layout: Layout, size: int, rng: np.random.Generator
) -> tuple[Array, NDArray[np.uint8]]:
    """Render sky and ground: the canvas [size, size, 3] and its labels [size, size]."""
    y, x = grid(size)
    if layout.sky is None or layout.ground is None:
        name = layout.backgrounds[0]
        labels = np.full((size, size), CLASS_NAMES.index(name), dtype=np.uint8)
        return TEXTURES[name](y, x, size, rng), labels
    edge = layout.horizon + 0.03 * layout.hilly * np.sin(7.0 * x + layout.phase)
    above = y < edge
    sky = TEXTURES[layout.sky](y, x, size, rng)
    ground = TEXTURES[layout.ground](y, x, size, rng)
    labels = np.empty((size, size), dtype=np.uint8)
    labels[:] = np.where(above, CLASS_NAMES.index(layout.sky), CLASS_NAMES.index(layout.ground))
    return np.where(above[..., None], sky, ground), labels


def _draw(
    placement: Placement,
    light: tuple[float, float],
    canvas: Array,
    instances: NDArray[np.uint8],
    number: int,
) -> None:
    """Paint one object onto the canvas and into the instance map, in place."""
    size = canvas.shape[0]
    radius = placement.radius * size
    cx, cy = placement.x * size, placement.y * size
    reach = radius * 1.42 + 1.0
    x0, y0 = max(0, int(cx - reach)), max(0, int(cy - reach))
    x1, y1 = min(size, int(cx + reach) + 1), min(size, int(cy + reach) + 1)
    # Everything below is computed in the box of the object only, [h, w].
    cover, mark, line = _coverage(placement, size, (cx - x0, cy - y0), (x1 - x0, y1 - y0))
    # Coordinates relative to the centre, in 1/112 of the side, then rotated into the object.
    px = (np.arange(x0, x1, dtype=np.float32) + 0.5 - cx)[None, :] * np.float32(112.0 / size)
    py = (np.arange(y0, y1, dtype=np.float32) + 0.5 - cy)[:, None] * np.float32(112.0 / size)
    cos, sin = np.float32(np.cos(placement.angle)), np.float32(np.sin(placement.angle))
    u, v = cos * px + sin * py, cos * py - sin * px
    colour, material, _ = placement.combination
    pixels = paint(colour, material, u, v, mark, light, placement.jitter)
    pixels *= (1.0 - 0.85 * line)[..., None]
    view = canvas[y0:y1, x0:x1]
    view += (pixels - view) * cover[..., None]
    instances[y0:y1, x0:x1][cover > 0.5] = number


def _coverage(
    placement: Placement, side: int, centre: tuple[float, float], extent: tuple[int, int]
) -> tuple[Array, Array, Array]:
    """Return the coverage by the object, its marks and its outlines, each [h, w] in 0..1."""
    s = _SUPERSAMPLE
    cos, sin = np.cos(placement.angle), np.sin(placement.angle)
    turn = np.array([[cos, sin], [-sin, cos]]) * (placement.radius * side * s)
    scale = np.array([placement.stretch, 1.0])
    offset = np.array(centre) * s
    body, marks, lines = (Image.new("L", (extent[0] * s, extent[1] * s)) for _ in range(3))
    on_body, on_marks, on_lines = (ImageDraw.Draw(layer) for layer in (body, marks, lines))
    pen = max(1, round(_OUTLINE * s * side / 112.0))
    for points, mode in SHAPES[placement.combination.shape]:
        corners = ((points * scale) @ turn + offset).ravel().tolist()
        if mode == "mark":
            on_marks.polygon(corners, fill=255)
        else:
            on_body.polygon(corners, fill=255 if mode == "add" else 0)
            on_lines.polygon(corners, fill=0)
            on_lines.line(corners + corners[:4], fill=255, width=pen, joint="curve")
    return _shrink(body), _shrink(marks), _shrink(lines)


def _shrink(mask: Image.Image) -> Array:
    """Average the supersampled pixels; returns values in 0..1."""
    return np.asarray(mask.reduce(_SUPERSAMPLE), dtype=np.float32) / np.float32(255.0)


def _visible(
    layout: Layout, labels: NDArray[np.uint8], instances: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], tuple[SceneObject, ...]]:
    """Return labels with the objects, instances numbered by visible objects, and these objects."""
    objects: list[SceneObject] = []
    numbers = np.zeros(len(layout.placements) + 1, dtype=np.uint8)
    classes = np.zeros(len(layout.placements) + 1, dtype=np.uint8)
    for number, placement in enumerate(layout.placements, start=1):
        mask = instances == number
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not rows.size:
            continue
        class_id = CLASS_NAMES.index(placement.combination.shape)
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        objects.append(SceneObject(placement.combination, class_id, box, int(mask.sum())))
        numbers[number], classes[number] = len(objects), class_id
    labels = np.where(instances > 0, classes[instances], labels)
    return labels, numbers[instances], tuple(objects)
