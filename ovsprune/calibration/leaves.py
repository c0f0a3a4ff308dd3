"""Dead-leaves images: procedural images with the statistics of photographs, made from a seed.

Two statistics of photographs are reproduced: amplitudes proportional to 1/frequency (Field, 1987),
and occluding shapes whose sizes follow a power law (the dead leaves model; Lee, Mumford and Huang,
2001). Networks can learn features for photographs from such images (Baradad et al., NeurIPS 2021).
Here they serve as calibration images for towers that were trained on photographs, if no photographs
are given.

The order of the random draws is part of the data set: changing it changes every image.

    >>> from ovsprune.calibration.leaves import render_leaves
    >>> render_leaves(0, seed=0, size=64).shape
    (64, 64, 3)
"""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from ovsprune.core.errors import DataError

__all__ = ["render_leaves"]

Array = NDArray[np.float32]
Rng = np.random.Generator

_HUES = (
    # probability, hue (mean, deviation; None: uniform), beta parameters of saturation and value
    (0.25, (0.08, 0.03), (2.0, 3.0), (2.0, 2.0)),  # earth, wood, skin
    (0.25, (0.28, 0.06), (2.5, 3.0), (2.0, 2.5)),  # foliage
    (0.18, (0.58, 0.04), (1.5, 3.0), (3.0, 2.0)),  # sky, water
    (0.20, None, (1.0, 8.0), (1.3, 1.3)),  # greys
    (0.12, None, (3.0, 1.5), (3.0, 1.5)),  # paint
)
_MIN_RADIUS, _MAX_RADIUS = 0.02, 0.45
"""Range of the leaves' radii, in sides of the image."""


def render_leaves(index: int, *, seed: int, size: int) -> NDArray[np.uint8]:
    """Render one image.

    Args:
        index: Index of the image, 0 or more.
        seed: Seed of the series, 0 or more.
        size: Side in pixels, at least 16.

    Returns:
        sRGB, uint8 [size, size, 3]; equal arguments give equal pixels.

    Raises:
        DataError: An argument is out of range.
    """
    if index < 0 or seed < 0 or size < 16:
        raise DataError(
            f"leaves {index} of seed {seed} at {size} pixels: give numbers of 0 or more, and at "
            "least 16 pixels"
        )
    rng = np.random.default_rng((seed, index))
    textures = [_texture(rng, size) for _ in range(int(rng.integers(4, 10)))]
    canvas = _landscape(rng, textures) if rng.random() < 0.55 else textures[0].copy()
    for radius in _radii(rng):
        _paint_leaf(rng, canvas, textures[int(rng.integers(len(textures)))], radius)
    return _apply_camera(rng, canvas)


def _noise(rng: Rng, size: int, slope: float, stretch: float = 1.0, turn: float = 0.0) -> Array:
    """Return Gaussian noise [size, size] of unit variance with amplitude frequency^-slope.

    Frequencies along the axis with direction ``turn`` + 90 degrees are multiplied by ``stretch``.
    """
    # Frequencies of the real FFT, [size, 1] and [1, size // 2 + 1].
    down, across = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]
    parallel = np.cos(turn) * across + np.sin(turn) * down
    orthogonal = (np.cos(turn) * down - np.sin(turn) * across) * stretch
    frequency = np.hypot(parallel, orthogonal)
    frequency[0, 0] = np.inf  # no constant part
    amplitude = np.maximum(frequency, 1.0 / size) ** -slope
    waves = rng.normal(size=(2, *amplitude.shape))
    field = np.fft.irfft2(amplitude * (waves[0] + 1j * waves[1]), s=(size, size))
    return np.asarray(field / field.std(), dtype=np.float32)


def _colour(rng: Rng) -> Array:
    """Draw an sRGB colour [3] in 0..1 from the colours that are frequent in photographs."""
    _, hue, saturation, value = _HUES[rng.choice(len(_HUES), p=[kind[0] for kind in _HUES])]
    turn = rng.random() if hue is None else rng.normal(*hue) % 1.0
    return np.array(
        colorsys.hsv_to_rgb(turn, rng.beta(*saturation), rng.beta(*value)), dtype=np.float32
    )


def _texture(rng: Rng, size: int) -> Array:
    """Draw a texture [size, size, 3] of two colours: clouds, stripes, or patches."""
    kind, slope = rng.random(), rng.uniform(0.7, 1.8)
    if kind < 0.7:
        tone = _noise(rng, size, slope, np.exp(rng.normal(0.0, 0.7)), rng.uniform(0.0, np.pi))
    elif kind < 0.85:
        tone = _striped(rng, size) + 0.5 * _noise(rng, size, slope)
    else:
        tone = np.tanh(3.0 * _noise(rng, size, rng.uniform(0.9, 1.4)) + rng.normal())
    base = _colour(rng)
    other = _colour(rng) if rng.random() < 0.4 else base * rng.uniform(0.3, 0.8)
    share = np.clip(0.5 + 0.35 * _noise(rng, size, 1.4), 0.0, 1.0) * rng.uniform(0.0, 0.7)
    contrast = rng.choice((0.06, 0.16, 0.3, 0.5, 0.8), p=(0.2, 0.25, 0.25, 0.2, 0.1))
    surface = base + (other - base) * share[..., None]
    return np.asarray(surface * np.exp(contrast * tone)[..., None], dtype=np.float32)


def _striped(rng: Rng, size: int) -> Array:
    """Draw stripes or a grid [size, size], vertical or horizontal, slightly warped."""
    down, across = (np.mgrid[:size, :size] / size).astype(np.float32)
    turn = rng.normal(0.0, 0.15) + np.pi / 2 * rng.integers(2)
    warp = rng.uniform(0.0, 0.06) * _noise(rng, size, 1.6)
    waves = np.exp(rng.uniform(np.log(4.0), np.log(40.0)))
    u = np.cos(turn) * across + np.sin(turn) * down + warp
    v = np.cos(turn) * down - np.sin(turn) * across + warp
    tone = np.sign(np.sin(2 * np.pi * waves * u) - rng.uniform(-0.7, 0.7))
    if rng.random() < 0.6:
        waves *= np.exp(rng.normal(0.0, 0.5))
        tone = tone * np.sign(np.sin(2 * np.pi * waves * v) - rng.uniform(-0.7, 0.7))
    return np.asarray(tone * rng.uniform(0.3, 1.0), dtype=np.float32)


def _landscape(rng: Rng, textures: list[Array]) -> Array:
    """Draw a ground plane in perspective under a smooth sky, [size, size, 3]."""
    ground, size = textures[0], len(textures[0])
    down, across = (np.mgrid[:size, :size] / size).astype(np.float32)
    horizon = rng.uniform(0.15, 0.7)
    # Perspective: a row at the distance ``below`` under the horizon shows depth 1 / below.
    below = np.clip(down - horizon, 0.004, None)
    rows = (rng.uniform(0.05, 0.3) / below * size).astype(int) % size
    columns = ((across - 0.5) * rng.uniform(0.1, 0.25) / below * size).astype(int) % size
    near = np.clip((down - horizon) / 0.25, 0.0, 1.0)[..., None]
    mean = ground.mean((0, 1))
    plane = mean + (ground[rows, columns] - mean) * near  # avoids aliasing far away
    blue = colorsys.hsv_to_rgb(rng.normal(0.58, 0.03) % 1.0, rng.beta(1.5, 4), rng.beta(5, 1.5))
    clouds = rng.choice((0.0, 0.05, 0.15)) * _noise(rng, size, rng.uniform(1.2, 1.9))
    shade = (1.0 + rng.uniform(-0.3, 0.3) * (down - horizon)) * np.exp(clouds)
    sky = (0.5 * _colour(rng) + 0.5 * np.array(blue)) * shade[..., None]
    ridge = 0.02 * rng.random() * _noise(rng, size, 1.5)[0]
    share = np.clip((down - horizon + ridge) * size / 2 + 0.5, 0.0, 1.0)[..., None]
    return np.asarray(sky + (plane - sky) * share, dtype=np.float32)


def _radii(rng: Rng) -> list[float]:
    """Draw radii from a power law, largest first; most images get a few larger ones."""
    count = int(np.exp(rng.uniform(np.log(3.0), np.log(70.0))))
    # Inverse transform sampling of a Pareto distribution with exponent 1.5.
    radii = np.clip(0.03 * (1.0 - rng.random(count)) ** (-1 / 1.5), _MIN_RADIUS, _MAX_RADIUS)
    if rng.random() < 0.6:
        radii[: int(rng.integers(1, 4))] = rng.uniform(0.12, 0.42)
    return sorted(radii.tolist(), reverse=True)


def _outline(rng: Rng) -> NDArray[np.float64]:
    """Draw an outline [n, 2] around 0 with a radius of about 1: wavy, oval, polygon, or bar."""
    kind, turn, stretch = rng.random(), rng.uniform(0.0, 2 * np.pi), np.exp(rng.normal(0.0, 0.45))
    angles = np.linspace(0.0, 2 * np.pi, 64, endpoint=False)
    distance = np.ones(64)
    if kind < 0.45:
        for wave in range(2, 8):
            crest = rng.uniform(0.0, 2 * np.pi)
            distance += rng.normal(0.0, 0.35 / wave) * np.cos(wave * angles + crest)
        distance = np.clip(distance, 0.15, 2.0)
    elif 0.6 <= kind < 0.85:
        corners = int(rng.integers(3, 7))
        even = np.linspace(0.0, 2 * np.pi, corners, endpoint=False)
        angles = np.sort(rng.uniform(0.0, 2 * np.pi, corners)) if rng.random() < 0.4 else even
        distance = np.ones(corners)
    elif kind >= 0.85:
        angles = np.array([0.1, np.pi - 0.1, np.pi + 0.1, -0.1])
        distance, stretch = np.full(4, 1.6), 1.0
        turn = rng.normal(0.0, 0.15) + np.pi / 2 * rng.integers(2)
    points = np.stack([np.cos(angles) * stretch, np.sin(angles) / stretch], 1) * distance[:, None]
    cosine, sine = np.cos(turn), np.sin(turn)
    return np.asarray(points @ np.array([[cosine, sine], [-sine, cosine]]))


def _paint_leaf(rng: Rng, canvas: Array, texture: Array, radius: float) -> None:
    """Paint one leaf on the canvas [size, size, 3], in place, with shading and a shadow."""
    size = len(canvas)
    centre = rng.uniform(-0.05, 1.05, 2)
    points = (_outline(rng) * radius + centre) * size
    blur = rng.uniform(0.2, 1.2) if rng.random() < 0.5 and radius > 0.05 else 0.0
    shadow = rng.uniform(0.2, 0.6) if rng.random() < 0.4 else 0.0
    offset = size * rng.uniform(0.005, 0.04)
    margin = int(np.ceil(3 * max(blur, offset if shadow else 0.0))) + 2
    low = np.clip(np.floor(points.min(0)).astype(int) - margin, 0, size)
    high = np.clip(np.ceil(points.max(0)).astype(int) + margin, 0, size)
    if (high <= low).any():
        return
    mask = _coverage(points - low, high - low, blur)
    part = canvas[low[1] : high[1], low[0] : high[0]]
    if shadow:
        shade = _coverage(points - low + offset * rng.uniform((-1, 0), 1), high - low, offset)
        part *= 1.0 - shadow * shade[..., None]
    # A random crop of the texture, resampled and wrapped around.
    shift = rng.integers(0, size, 2)
    rows, columns = (
        (np.arange(low[axis], high[axis]) * rng.uniform(0.6, 1.6)).astype(int) + shift[axis]
        for axis in (1, 0)
    )
    surface = texture[rows[:, None] % size, columns[None] % size] * np.exp(rng.normal(0.0, 0.25))
    x = (np.arange(low[0], high[0]) / size - centre[0])[None] / radius
    y = (np.arange(low[1], high[1]) / size - centre[1])[:, None] / radius
    turn = rng.uniform(0.0, 2 * np.pi)
    light = 1.0 + rng.uniform(0.0, 0.4) * (x * np.cos(turn) + y * np.sin(turn))
    if rng.random() < 0.3:  # shading of a ball
        light = light * (0.5 + 0.7 * np.sqrt(np.clip(1.0 - (x**2 + y**2) / 2, 0.0, 1.0)))
    part += (surface * np.clip(light, 0.3, 1.7)[..., None] - part) * mask[..., None]


def _coverage(points: NDArray[np.float64], box: NDArray[np.int_], blur: float) -> Array:
    """Return the coverage [height, width] in 0..1 of a polygon in pixels, with a blurred edge."""
    width, height = (int(side) for side in box)
    picture = Image.new("L", (2 * width, 2 * height))
    ImageDraw.Draw(picture).polygon([(float(2 * x), float(2 * y)) for x, y in points], fill=255)
    picture = picture.resize((width, height), Image.Resampling.BOX)
    if blur:
        picture = picture.filter(ImageFilter.GaussianBlur(blur))
    return np.asarray(picture, dtype=np.float32) / 255.0


def _apply_camera(rng: Rng, canvas: Array) -> NDArray[np.uint8]:
    """Simulate a camera: uneven light, exposure, white balance, gamma, blur and sensor noise."""
    size = len(canvas)
    light = np.exp(rng.uniform(0.0, 0.3) * _noise(rng, size, 2.0) + rng.normal(0.0, 0.15))
    balance = np.exp(rng.normal(0.0, 0.06, 3))
    exposed = np.clip(canvas * light[..., None] * balance, 0.0, 1.2) ** rng.uniform(0.8, 1.25)
    picture = Image.fromarray((np.clip(exposed, 0.0, 1.0) * 255).astype(np.uint8))
    if rng.random() < 0.6:
        picture = picture.filter(ImageFilter.GaussianBlur(size / 192 * rng.uniform(0.2, 1.0)))
    grain = rng.normal(0.0, rng.uniform(0.0, 6.0), (size, size, 1))
    return np.clip(np.asarray(picture, dtype=np.float32) + grain, 0, 255).astype(np.uint8)
