"""Image towers of open_clip's own, and the CLIP around them, as backbones of their families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

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
from ovsprune.core.records import Preprocess

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
    backbone = assemble(
        family,
        source.name,
        source.pretrained,
        model,
        source.config,
        preprocess_of(model.visual, source.preprocess),
        trained=source.weights is not None,
        text=text,
    )
    backbone.notes = source.notes
    return backbone


def rebuild_own(
    family: str,
    name: str,
    pretrained: str | None,
    architecture: Mapping[str, Any],
    preprocess: Preprocess,
    *,
    trained: bool,
    text: Mapping[str, Tensor],
) -> Backbone:
    """The dense CLIP that a checkpoint was made from, its image tower with random weights.

    The arguments after ``family`` are those of :meth:`ovsprune.core.protocols.Family.build`.

    Raises:
        WeightsError: ``text`` does not fit.
    """
    model = build_clip(architecture)
    if text and has_own_text(architecture):
        fit_text(name, text, model)
    return assemble(
        family, name, pretrained, model, architecture, preprocess, trained=trained, text=text
    )


def assemble(
    family: str,
    name: str,
    pretrained: str | None,
    model: nn.Module,
    config: Mapping[str, Any],
    preprocess: Preprocess,
    *,
    trained: bool,
    text: Mapping[str, Tensor] | None = None,
) -> Backbone:
    """The backbone record of a built CLIP.

    Its activation is that of the configuration's GELUs; a family whose tower has another says so.

    Args:
        family: Name in the registry of families.
        name: What the model is called.
        pretrained: Which weights.
        model: From :func:`~ovsprune.backbones.open_clip_model.build_clip`.
        config: What it was built from.
        preprocess: How pictures become its input.
        trained: Whether the weights are.
        text: State of everything but the tower; the model's own by default, empty for a model whose
            text tower has no weights.
    """
    import open_clip

    if text is None:
        text = {k: v for k, v in model.state_dict().items() if not k.startswith("visual.")}
    return Backbone(
        name=name,
        pretrained=pretrained,
        trained=trained,
        family=family,
        tower=model.get_submodule("visual"),
        stages=FAMILIES.get(family).stages,
        preprocess=preprocess,
        activation="quick_gelu" if config.get("quick_gelu") else "gelu",
        architecture=dict(config),
        library_version=open_clip.__version__,
        text=text,
        encoder=encoder_of(model, config) if text and has_own_text(config) else None,
    )
