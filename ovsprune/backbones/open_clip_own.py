"""Image towers of open_clip's own, and the CLIP around them, as backbones of their families."""

from __future__ import annotations

from torch import nn

from ovsprune.backbones import FAMILIES
from ovsprune.backbones.open_clip_model import (
    build_clip,
    encoder_of,
    fit_text,
    has_own_text,
    preprocess_of,
)
from ovsprune.backbones.open_clip_source import fill, open_source
from ovsprune.core.protocols import Backbone
from ovsprune.core.records import DenseModel

__all__ = ["assemble", "load_own", "rebuild_own"]


def load_own(family: str, name: str, pretrained: str | None, activation: str | None) -> Backbone:
    """Build the CLIP called ``name`` and load its weights.

    See :func:`ovsprune.backbones.open_clip_source.open_source`. A text tower that lives on a hub is
    not built; its state is passed on where the file has it.

    Args:
        family: Name in the registry of families.
        name: As the family's ``load`` takes it, and the others likewise.
        pretrained: Which weights.
        activation: What they were trained with, where they do not tell.

    Raises:
        WeightsError: The weights cannot be had or do not fit.
        OptionError: ``activation`` is unknown, or contradicts the tag's own.
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


def rebuild_own(family: str, dense: DenseModel) -> Backbone:
    """Build the dense CLIP that a checkpoint was made from, its image tower with random weights.

    Args:
        family: Name in the registry of families.
        dense: Its description.

    Raises:
        WeightsError: ``dense.text`` does not fit.
    """
    model = build_clip(dense.architecture)
    if dense.text and has_own_text(dense.architecture):
        fit_text(dense.name, dense.text, model)
    return assemble(family, dense, model)


def assemble(family: str, dense: DenseModel, model: nn.Module) -> Backbone:
    """Make the backbone of a built CLIP.

    Its activation is that of the configuration's GELUs; a family whose tower has another one sets
    it afterwards.

    Args:
        family: Name in the registry of families.
        dense: Description of the model; ``text`` is empty for a text tower without weights.
        model: From :func:`~ovsprune.backbones.open_clip_model.build_clip`.
    """
    import open_clip

    config = dense.architecture
    return Backbone(
        name=dense.name,
        pretrained=dense.pretrained,
        trained=dense.trained,
        family=family,
        tower=model.get_submodule("visual"),
        stages=FAMILIES.get(family).stages,
        preprocess=dense.preprocess,
        activation="quick_gelu" if config.get("quick_gelu") else "gelu",
        architecture=dict(config),
        library_version=open_clip.__version__,
        text=dense.text,
        encoder=encoder_of(model, config) if dense.text and has_own_text(config) else None,
    )
