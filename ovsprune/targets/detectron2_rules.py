"""Common parts of the frameworks on detectron2: their input, and the lines of their script."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["one_picture", "picture_of", "script_for"]

_SIDE = 512
_SCRIPT = """\
# train_net.py of {whose}
import ovsprune.targets  # pip install --no-deps ovsprune
{prelude}
class Trainer(DefaultTrainer):
    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        ovsprune.targets.load_into(model, {{output!r}})  # slim modules, then every tensor
        return model

{ending}"""
_ENDING = """\
# Start without MODEL.WEIGHTS: detectron2 would drop what has another shape and only warn. Files
# that this training saves are slim and load as usual (MODEL.WEIGHTS, --resume).
"""


def picture_of(height: int, width: int) -> Mapping[str, Any]:
    """Return the arguments of a forward pass over one image of that size in pixels."""
    picture = {"image": torch.zeros(3, height, width), "height": height, "width": width}
    return {"batched_inputs": [picture]}


def one_picture(model: Any) -> Mapping[str, Any]:
    """Return the arguments of a forward pass over one image of 512 x 512 pixels."""
    return picture_of(_SIDE, _SIDE)


def script_for(whose: str, *, prelude: str = "", ending: str = _ENDING) -> str:
    """Return the lines for a training script, with ``{output!r}`` in place of the directory.

    Args:
        whose: Name of the framework in the first line.
        prelude: Lines after the import.
        ending: Comment on checkpoints behind the class.
    """
    return _SCRIPT.format(whose=whose, prelude=prelude and f"\n{prelude}", ending=ending)
