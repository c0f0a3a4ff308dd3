"""Example input and training script lines that all frameworks on detectron2 share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["image_inputs", "script_for"]

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


def image_inputs(model: Any, size: tuple[int, int] = (512, 512)) -> Mapping[str, Any]:
    """Return the arguments of a forward pass over one image of ``size`` (height, width)."""
    height, width = size
    image = {"image": torch.zeros(3, height, width), "height": height, "width": width}
    return {"batched_inputs": [image]}


def script_for(framework: str, *, prelude: str = "", ending: str = _ENDING) -> str:
    """Return the lines for a training script, with ``{output!r}`` in place of the directory.

    ``prelude`` follows the import; ``ending`` is a comment on checkpoints after the class.
    """
    return _SCRIPT.format(framework=framework, prelude=prelude and f"\n{prelude}", ending=ending)
