"""Conversion of images to input tensors of a tower."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ovsprune.core.errors import OptionError
from ovsprune.core.records import Preprocess

__all__ = ["normalise", "to_tensor"]

_RESAMPLING = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}


def to_tensor(image: Image.Image, preprocess: Preprocess) -> Tensor:
    """Convert an image to the input of a tower, float32 [3, H, W].

    The resize modes are those of open_clip: ``shortest`` resizes the shorter side and crops the
    centre, ``squash`` ignores the aspect ratio, ``longest`` fits the longer side and pads with the
    mean colour.

    Raises:
        OptionError: The interpolation or the resize mode is unknown.
    """
    if preprocess.interpolation not in _RESAMPLING:
        raise OptionError(
            f"unknown interpolation {preprocess.interpolation!r}; known: {', '.join(_RESAMPLING)}"
        )
    resampling = _RESAMPLING[preprocess.interpolation]
    height, width = preprocess.size
    image = image.convert("RGB")
    ratios = height / image.height, width / image.width
    match preprocess.resize_mode:
        case "squash":
            image = image.resize((width, height), resampling)
        case "shortest":
            scale = max(ratios)
            w, h = max(width, round(image.width * scale)), max(height, round(image.height * scale))
            left, top = (w - width) // 2, (h - height) // 2
            image = image.resize((w, h), resampling)
            image = image.crop((left, top, left + width, top + height))
        case "longest":
            scale = min(ratios)
            w, h = max(1, round(image.width * scale)), max(1, round(image.height * scale))
            mean_colour = tuple(round(255 * m) for m in preprocess.mean)
            canvas = Image.new("RGB", (width, height), mean_colour)
            canvas.paste(image.resize((w, h), resampling), ((width - w) // 2, (height - h) // 2))
            image = canvas
        case other:
            raise OptionError(f"unknown resize mode {other!r}; known: shortest, squash, longest")
    return normalise(np.asarray(image), preprocess)


def normalise(image: NDArray[np.uint8], preprocess: Preprocess) -> Tensor:
    """Convert uint8 [H, W, 3] to float32 [3, H, W], minus the mean, divided by the deviation."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
    mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
    return (pixels - mean[:, None, None]) / std[:, None, None]
