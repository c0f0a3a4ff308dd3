"""Families of open_clip's ``TimmModel``: what they share, around what each says of its own trunk.

A new one is one file with a class of the shape :class:`TimmParts`, decorated with
``@timm_family("open_clip-mine")``, and an entry in the table of ``ovsprune/slim/load.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Protocol, TypeVar

import torch
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
from ovsprune.core.errors import OptionError
from ovsprune.core.protocols import Backbone, PrunableLayer, Stages
from ovsprune.core.records import DenseModel, Group, Plan, Preprocess
from ovsprune.slim.activation import find_activations
from ovsprune.slim.timm_tower import build_timm_tower

__all__ = ["TimmFamily", "TimmParts", "pools_positions", "timm_family"]


class TimmParts(Protocol):
    """What a family of ``TimmModel`` towers says; the rest of a family is the same for all."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules of timm that define its trunks, for the list of names."""
        ...

    def takes(self, vision: Mapping[str, Any], trunk: nn.Module) -> bool:
        """Whether this is one of its towers.

        Args:
            vision: ``vision_cfg`` of open_clip's configuration.
            trunk: What timm builds for it, without weights and with timm's own head.
        """
        ...

    def rewrite(self, tower: nn.Module) -> None:
        """As :meth:`ovsprune.core.protocols.Family.rewrite`."""
        ...

    def finish(self, tower: nn.Module, groups: Sequence[Group], plan: Plan) -> None:
        """As :meth:`ovsprune.core.protocols.Family.finish`."""
        ...

    def prunable_layers(self, tower: nn.Module) -> list[PrunableLayer]:
        """As :meth:`ovsprune.core.protocols.Family.seeds`."""
        ...

    def stages(self, tower: nn.Module) -> Stages:
        """As :meth:`ovsprune.core.protocols.Family.stages`."""
        ...


P = TypeVar("P", bound=TimmParts)


def timm_family(name: str) -> Callable[[type[P]], type[P]]:
    """Decorate the parts of a family, which is registered under ``name``."""

    def decorate(parts: type[P]) -> type[P]:
        FAMILIES.add(name, TimmFamily(name, parts()), parts.__doc__)
        return parts

    return decorate


class TimmFamily:
    """A backbone family made of its parts.

    Args:
        name: In the registry.
        parts: What is its own.
    """

    library = "open_clip_torch"

    def __init__(self, name: str, parts: TimmParts) -> None:
        self.name, self.parts = name, parts
        self.rewrite, self.finish = parts.rewrite, parts.finish
        self.prunable_layers, self.stages = parts.prunable_layers, parts.stages

    def names(self) -> Sequence[str]:
        """open_clip's names for trunks of the family's modules of timm."""
        return _names(self.parts.modules)

    def takes(self, config: Mapping[str, Any]) -> bool:
        """Whether open_clip builds, from ``config``, a trunk that the family takes."""
        vision = config["vision_cfg"]
        trunk = _trunk(str(vision.get("timm_model_name")))
        return trunk is not None and self.parts.takes(vision, trunk)

    def load(self, name: str, pretrained: str | None, activation: str | None) -> Backbone:
        """Load a name of open_clip's, or a folder of its form.

        Args:
            name: The name or the folder.
            pretrained: A tag, a file (of the whole CLIP or the image tower alone), ``"none"``, or
                None for the folder's own weights.
            activation: What the network has anyway, or None.

        Raises:
            WeightsError: The weights cannot be had or do not fit.
            OptionError: ``activation`` is not the network's own.
        """
        source = open_source(name, pretrained, None)
        model = build_clip(source.config)
        text = fill(source, model)
        tower = model.get_submodule("visual")
        dense = DenseModel(
            name=source.name,
            architecture=source.config,
            preprocess=_preprocess(tower, source.preprocess),
            pretrained=source.pretrained,
            trained=source.weights is not None,
            text=text,
        )
        backbone = self._backbone(dense, tower)
        if text and has_own_text(source.config):
            backbone.encoder = encoder_of(model, source.config)
        backbone.notes = source.notes
        if activation not in (None, backbone.activation):
            raise OptionError(
                f"--activation {activation!r}: {name} has {backbone.activation}; leave it out"
            )
        return backbone

    def build(self, dense: DenseModel) -> Backbone:
        """Build the dense tower with random weights, and the CLIP around it if there is a text."""
        encoder = None
        if dense.text and has_own_text(dense.architecture):
            model = build_clip(dense.architecture)
            fit_text(dense.name, dense.text, model)
            tower, encoder = model.get_submodule("visual"), encoder_of(model, dense.architecture)
        else:
            tower = build_timm_tower(dense.architecture)
        backbone = self._backbone(dense, tower)
        backbone.encoder = encoder
        return backbone

    def _backbone(self, dense: DenseModel, tower: nn.Module) -> Backbone:
        import open_clip

        # Of the blocks that can be cut: others may have gates of their own kind.
        blocks = [tower.get_submodule(seed.block) for seed in self.prunable_layers(tower)]
        (activation,) = find_activations(m for block in blocks for m in block.modules())
        return Backbone(
            name=dense.name,
            pretrained=dense.pretrained,
            trained=dense.trained,
            family=self.name,
            tower=tower,
            stages=self.stages,
            preprocess=dense.preprocess,
            activation=activation,
            architecture=dict(dense.architecture),
            library_version=open_clip.__version__,
            text=dense.text,
        )


def pools_positions(vision: Mapping[str, Any]) -> bool:
    """Whether the features are pooled by a mean or a maximum, so that one position is as good."""
    pool, projection = vision.get("timm_pool", "avg"), vision.get("timm_proj", "linear")
    # without a pool of its own a trunk keeps timm's, if open_clip puts a projection behind it
    pools = pool in ("avg", "max", "avgmax") or (pool == "" and projection in ("linear", "mlp"))
    return pools and projection in ("linear", "mlp", "none", "", None)


def _preprocess(tower: Any, overrides: Mapping[str, Any]) -> Preprocess:
    """The preprocessing, at the size that the trunk was built for, which may take no other.

    open_clip's configuration of ViTamin-XL-384 says 256.
    """
    found = preprocess_of(tower, overrides)
    own = getattr(getattr(tower.trunk, "patch_embed", None), "img_size", None)
    return found if own is None else replace(found, size=(own[0], own[1]))


@cache
def _names(modules: tuple[str, ...]) -> tuple[str, ...]:
    import open_clip
    import timm

    listed = {name: open_clip.get_model_config(name) for name in open_clip.list_models()}
    trunks = {n: str(c["vision_cfg"].get("timm_model_name")) for n, c in listed.items()}
    return tuple(
        n for n, trunk in trunks.items() if timm.models.is_model_in_modules(trunk, modules)
    )


@cache
def _trunk(name: str) -> nn.Module | None:
    """The model of timm of that name, on the meta device."""
    import timm

    if not timm.is_model(name):
        return None
    with torch.device("meta"):
        trunk: nn.Module = timm.create_model(name, pretrained=False)
    return trunk
