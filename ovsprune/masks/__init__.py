"""Unstructured masks: which single weights of a tower stay, and which are zero.

A mask is a bool tensor of its weight's shape, True where the weight stays; masks are a mapping from
a parameter's dotted name in the tower (``"layer1.0.conv1.weight"``) to its mask. Needs torch and
safetensors only; see ``docs/masks.md``.
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
