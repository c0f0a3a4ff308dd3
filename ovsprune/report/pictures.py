"""Images of segmentations side by side, with a class legend."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

__all__ = ["paint", "palette", "side_by_side"]

Pixels = NDArray[np.uint8]
Labels = NDArray[np.integer[Any]]
Colour = tuple[int, int, int]

# Sizes in pixels.
PANEL = 252
GAP = 12
TEXT = 15
INK: Colour = (32, 32, 36)
PAPER: Colour = (255, 255, 255)
VOID: Colour = (200, 200, 200)

# (saturation, value). Neighbouring hues get different lightness, to be distinct in print, too.
_SHADES = ((0.85, 0.95), (0.55, 0.70), (0.95, 0.55))


def palette(classes: Sequence[int]) -> dict[int, Colour]:
    """Return a colour for each class id, spread evenly over the hues.

    >>> palette([3, 7])
    {3: (242, 36, 36), 7: (80, 178, 80)}
    """
    colours = {}
    shades = len(_SHADES)
    # A multiple of the number of shades, so that the first and last hues differ in shade, too.
    hues = shades * -(-len(classes) // shades)
    for index, identifier in enumerate(classes):
        saturation, value = _SHADES[index % shades]
        red, green, blue = colorsys.hsv_to_rgb(index / hues, saturation, value)
        colours[int(identifier)] = (round(255 * red), round(255 * green), round(255 * blue))
    return colours


def paint(labels: Labels, colours: Mapping[int, Colour]) -> Pixels:
    """Colour class ids [H, W] as uint8 [H, W, 3]; ids without a colour are grey."""
    painted = np.empty((*labels.shape, 3), dtype=np.uint8)
    painted[:] = VOID
    for identifier, colour in colours.items():
        painted[labels == identifier] = colour
    return painted


def side_by_side(
    rows: Sequence[tuple[Pixels, Sequence[Labels]]], titles: Sequence[str], names: Sequence[str]
) -> Image.Image:
    """Draw one row per image: the image, then each of its label maps, below ``titles``.

    Args:
        rows: Image, uint8 [H, W, 3], and label maps, each [H, W], of indices into ``names``.
        titles: Titles of the image and of each label map.
        names: Names of all classes; the legend shows those that occur.

    Returns:
        An RGB image.

    Raises:
        ValueError: A row does not have one label map per title after the first.
    """
    for _, maps in rows:
        if len(maps) != len(titles) - 1:
            raise ValueError(f"{len(maps)} label maps in a row, expected {len(titles) - 1}")
    shown = sorted({int(i) for _, maps in rows for labels in maps for i in np.unique(labels)})
    # Void pixels have the index -1.
    shown = [i for i in shown if 0 <= i < len(names)]
    colours = palette(shown)
    font = ImageFont.load_default(TEXT)
    width = GAP + len(titles) * (PANEL + GAP)
    legend = _legend_rows(shown, names, font, width)
    line = TEXT + 10
    top = GAP + 2 * TEXT
    height = top + len(rows) * (PANEL + GAP) + GAP + len(legend) * line
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        draw.text((GAP + column * (PANEL + GAP), GAP), title, fill=INK, font=font)
    for number, (image, maps) in enumerate(rows):
        panels = [_panel(image, Image.Resampling.BICUBIC)]
        # Interpolation between two colours would show a third class.
        panels += [_panel(paint(labels, colours), Image.Resampling.NEAREST) for labels in maps]
        for column, panel in enumerate(panels):
            canvas.paste(panel, (GAP + column * (PANEL + GAP), top + number * (PANEL + GAP)))
    y = top + len(rows) * (PANEL + GAP) + GAP // 2
    for entries in legend:
        for x, identifier in entries:
            draw.rectangle((x, y, x + TEXT, y + TEXT), fill=colours[identifier], outline=INK)
            draw.text((x + TEXT + 6, y - 1), names[identifier], fill=INK, font=font)
        y += line
    return canvas


def _panel(pixels: Pixels, resampling: Image.Resampling) -> Image.Image:
    """Fit the image into a square of PANEL pixels, keeping its aspect ratio."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    scale = PANEL / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    square = Image.new("RGB", (PANEL, PANEL), PAPER)
    square.paste(image.resize(size, resampling), ((PANEL - size[0]) // 2, (PANEL - size[1]) // 2))
    return square


def _legend_rows(
    shown: Sequence[int], names: Sequence[str], font: Any, width: int
) -> list[list[tuple[int, int]]]:
    """Break legend entries (x, class id) into lines that fit ``width``."""
    lines: list[list[tuple[int, int]]] = [[]]
    x = GAP
    for identifier in shown:
        wide = TEXT + 6 + int(font.getlength(names[identifier])) + 18  # box, gap, name, gap
        # An entry that is wider than the image has a line of its own.
        if x + wide > width and lines[-1]:
            lines.append([])
            x = GAP
        lines[-1].append((x, identifier))
        x += wide
    return lines
