"""Unstructured masks, which set single weights of a tower to zero.

A mask is a bool tensor of its weight's shape, True where the weight is kept. Masks are a map from a
parameter's dotted name in the tower (``"layer1.0.conv1.weight"``) to its mask. This package needs
torch and safetensors only. See ``docs/masks.md``.
"""

from ovsprune.masks.apply import Applied, apply_masks
from ovsprune.masks.files import read_masks, read_weights, write_masks
from ovsprune.masks.names import Placement, match

__all__ = [
    "Applied",
    "Placement",
    "apply_masks",
    "match",
    "read_masks",
    "read_weights",
    "write_masks",
]
