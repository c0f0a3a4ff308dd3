"""Loading a model to prune, and the data type of the saved tower."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ovsprune import backbones
from ovsprune.core.clock import Clock
from ovsprune.core.errors import OptionError
from ovsprune.core.progress import Progress
from ovsprune.core.protocols import Backbone

__all__ = ["DTYPES", "cast", "check_dtype", "open_model"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Data types in which a tower can be saved."""


def open_model(
    model: str | Backbone,
    pretrained: str | None,
    activation: str | None,
    device: str,
    progress: Progress,
    clock: Clock,
) -> Backbone:
    """Return the model to prune, loaded if it is a name, and report its notes.

    The arguments are those of :func:`ovsprune.backbones.load_backbone`.

    Raises:
        WeightsError: The weights cannot be loaded.
    """
    if isinstance(model, str):
        with progress.stage(f"loading {model}", 1) as advance:
            model = backbones.load_backbone(
                model, pretrained=pretrained, activation=activation, device=device
            )
            advance(1)
        clock.lap("load")
    for note in model.notes:
        progress.note(note)
    if not model.trained:
        progress.note(f"{model.name} has random weights: the result is marked as untrained")
    return model


def check_dtype(dtype: str) -> None:
    """Raise OptionError if ``dtype`` is not in :data:`DTYPES`."""
    if dtype not in DTYPES:
        raise OptionError(f"--dtype {dtype!r} is unknown; known: {', '.join(DTYPES)}")


def cast(state: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Return the floating-point tensors as ``dtype``, and integer tensors unchanged.

    Raises:
        OptionError: A value is too large for ``dtype``.
    """
    converted = {
        name: tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }
    for name, tensor in converted.items():
        if not tensor.isfinite().all() and state[name].isfinite().all():
            raise OptionError(
                f"--dtype {dtype} cannot hold {name}, whose largest value is "
                f"{float(state[name].abs().max()):.3g}; take bfloat16 or float32"
            )
    return converted
