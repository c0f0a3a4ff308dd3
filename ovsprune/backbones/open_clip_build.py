"""Load and build a CLIP of open_clip as a backbone; every family of open_clip uses this."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn

from ovsprune.backbones.open_clip_model import (
    build_clip,
    encoder_of,
    fit_text,
    has_own_text,
    preprocess_of,
)
from ovsprune.backbones.open_clip_source import config_of, fill, open_source
from ovsprune.backbones.registry import FAMILIES
from ovsprune.core.protocols import Backbone
from ovsprune.core.records import DenseModel

__all__ = ["assemble", "load_clip", "names_of", "rebuild_clip"]


def load_clip(family: str, name: str, pretrained: str | None, activation: str | None) -> Backbone:
    """Build a CLIP and load its weights; see :func:`~open_clip_source.open_source`.

    Raises:
        WeightsError: The weights cannot be loaded or do not fit.
        OptionError: ``activation`` is unknown, or contradicts the weights.
    """
    source = open_source(name, pretrained, activation)
    model = build_clip(source.config)
    text = fill(source, model)
    dense = DenseModel(
        name=source.name,
        architecture=source.config,
        preprocess=preprocess_of(model.visual, source.preprocess),
        pretrained=source.pretrained,
        trained=source.weights is not None,
        text=text,
    )
    backbone = assemble(family, dense, model)
    backbone.notes = source.notes
    return backbone


def rebuild_clip(family: str, dense: DenseModel) -> Backbone:
    """Build the dense CLIP of a checkpoint, with random weights in its image tower.

    Raises:
        WeightsError: ``dense.text`` does not fit the model.
    """
    model = build_clip(dense.architecture)
    # The text tower is not pruned, so its tensors fit the dense model.
    if dense.text and has_own_text(dense.architecture):
        fit_text(dense.name, dense.text, model)
    return assemble(family, dense, model)


@cache
def names_of(family: str) -> tuple[str, ...]:
    """Return open_clip's names of the models that ``family`` takes."""
    import open_clip

    takes = FAMILIES.get(family).takes
    return tuple(name for name in open_clip.list_models() if takes(config_of(name)))


def assemble(family: str, dense: DenseModel, model: nn.Module) -> Backbone:
    """Make the backbone of a CLIP from :func:`~ovsprune.backbones.open_clip_model.build_clip`.

    The activation is the GELU of the configuration. A family whose towers have another activation
    sets it afterwards.
    """
    import open_clip

    config = dense.architecture
    tower: Any = model.get_submodule("visual")
    if hasattr(tower, "output_tokens"):
        tower.output_tokens = False  # CoCa's tower would also return tokens for its text decoder
    return Backbone(
        name=dense.name,
        pretrained=dense.pretrained,
        trained=dense.trained,
        family=family,
        tower=tower,
        stages=FAMILIES.get(family).stages,
        preprocess=dense.preprocess,
        activation="quick_gelu" if config.get("quick_gelu") else "gelu",
        architecture=dict(config),
        library_version=open_clip.__version__,
        text=dense.text,
        encoder=encoder_of(model, config) if dense.text and has_own_text(config) else None,
    )
