"""What the frameworks on detectron2 have in common: how they are run, trained, and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["one_picture", "script_for"]

_SIDE = 512
_SCRIPT = """\
# train_net.py of {whose}
import ovsprune.targets  # pip install --no-deps ovsprune

class Trainer(DefaultTrainer):
    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        ovsprune.targets.load(model, {{output!r}})  # slim modules, then every tensor
        return model

# Start without MODEL.WEIGHTS: detectron2 would drop what has another shape and only warn. Files
# that this training saves are slim and load as usual (MODEL.WEIGHTS, --resume).
"""


def one_picture(model: Any) -> Mapping[str, Any]:
    """The arguments of a forward pass over one picture of 512 x 512 pixels."""
    picture = {"image": torch.zeros(3, _SIDE, _SIDE), "height": _SIDE, "width": _SIDE}
    return {"batched_inputs": [picture]}


def script_for(whose: str) -> str:
    """The lines for a training script, with ``{output!r}`` where the directory goes."""
    return _SCRIPT.format(whose=whose)
