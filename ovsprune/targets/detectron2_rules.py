"""Example input and training script lines that all frameworks on detectron2 share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["image_inputs", "script_for", "sized_image_inputs"]

_SIDE = 512
_SCRIPT = """\
# train_net.py of {framework}
import ovsprune.targets  # pip install --no-deps ovsprune
{prelude}
class Trainer(DefaultTrainer):
    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        ovsprune.targets.load_into(model, {{output!r}})  # replaces modules, loads every tensor
        return model

{ending}"""
_ENDING = """\
# Leave MODEL.WEIGHTS empty: detectron2 skips tensors with another shape and only logs a warning.
# Checkpoints that this training saves are slim and load as usual (MODEL.WEIGHTS, --resume).
"""


def sized_image_inputs(height: int, width: int) -> Mapping[str, Any]:
    """Return the arguments of a forward pass over one image of ``height`` x ``width`` pixels."""
    image = {"image": torch.zeros(3, height, width), "height": height, "width": width}
    return {"batched_inputs": [image]}


def image_inputs(model: Any) -> Mapping[str, Any]:
    """Return the arguments of a forward pass over one image of 512 x 512 pixels."""
    return sized_image_inputs(_SIDE, _SIDE)


def script_for(framework: str, *, prelude: str = "", ending: str = _ENDING) -> str:
    """Return the lines for a training script, with ``{output!r}`` in place of the directory.

    Args:
        framework: Name of the framework, for the first line.
        prelude: Lines after the import.
        ending: Comment on checkpoints after the class.
    """
    return _SCRIPT.format(framework=framework, prelude=prelude and f"\n{prelude}", ending=ending)
