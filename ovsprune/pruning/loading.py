"""Loading a model to prune, and the data type of the saved tower."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ovsprune import backbones
from ovsprune.core.clock import Clock
from ovsprune.core.errors import OptionError
from ovsprune.core.progress import Progress
from ovsprune.core.protocols import Backbone
from ovsprune.profiling.timing import DTYPES

__all__ = ["cast", "check_dtype", "load_model", "open_model"]


def load_model(
    model: str | Backbone,
    pretrained: str | None,
    activation: str | None,
    device: str,
    progress: Progress,
) -> Backbone:
    """Return the model, loaded if it is a name.

    Args:
        model: Name (see :func:`ovsprune.backbones.load_backbone`) or loaded backbone.
        pretrained: Tag, file, or ``"none"``.
        activation: ``"gelu"`` or ``"quick_gelu"``, for a weights file that does not say which.
        device: Device of the tower.
        progress: Progress reporter.

    Raises:
        WeightsError: The weights cannot be loaded.
    """
    if not isinstance(model, str):
        return model
    with progress.stage(f"loading {model}", 1) as advance:
        backbone = backbones.load_backbone(
            model, pretrained=pretrained, activation=activation, device=device
        )
        advance(1)
    return backbone


def open_model(
    model: str | Backbone,
    pretrained: str | None,
    activation: str | None,
    device: str,
    progress: Progress,
    clock: Clock,
) -> Backbone:
    """Return the model to prune like :func:`load_model`; report its notes.

    The seconds of loading go to ``clock``.
    """
    backbone = load_model(model, pretrained, activation, device, progress)
    if backbone is not model:
        clock.lap("load")
    for note in backbone.notes:
        progress.note(note)
    if not backbone.trained:
        progress.note(f"{backbone.name} has random weights: the result is marked as untrained")
    return backbone


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
        # float16 ends at 65504: larger values became infinite. Values that were infinite before are
        # not an error of the type.
        if not tensor.isfinite().all() and state[name].isfinite().all():
            raise OptionError(
                f"--dtype {dtype} cannot hold {name}, whose largest value is "
                f"{float(state[name].abs().max()):.3g}; take bfloat16 or float32"
            )
    return converted
