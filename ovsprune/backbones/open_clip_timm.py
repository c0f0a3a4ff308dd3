"""Families of open_clip's ``TimmModel``: loading and building, around the parts of one trunk.

A new family is one file with a class that has the members of :class:`TimmParts`, decorated with
``@timm_family("open_clip-mine")``, and one entry in the table of ``ovsprune/slim/load.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from ovsprune.backbones.open_clip_build import assemble, load_clip, rebuild_clip
from ovsprune.backbones.open_clip_model import has_own_text
from ovsprune.backbones.registry import FAMILIES
from ovsprune.core.errors import OptionError
from ovsprune.core.protocols import Backbone, PrunableLayer, Stages
from ovsprune.core.records import DenseModel, Group, Plan
from ovsprune.slim.activation import find_activations
from ovsprune.slim.timm_tower import build_timm_tower

__all__ = ["TimmFamily", "TimmParts", "pools_positions", "timm_family"]


class TimmParts(Protocol):
    """Members of a family of ``TimmModel`` towers that depend on the trunk.

    See :class:`ovsprune.core.protocols.Family` for those without a description.
    """

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules of timm that define the trunks; :meth:`Family.names` lists their models."""

    def takes(self, vision: Mapping[str, Any], trunk: nn.Module) -> bool:
        """Return True if the family supports a trunk.

        Args:
            vision: ``vision_cfg`` of open_clip's configuration.
            trunk: The trunk as timm builds it, on the meta device and with timm's own head.
        """

    def rewrite(self, tower: nn.Module) -> None:
        """Replace modules that cannot be cut or refitted, in place."""

    def finish(self, tower: nn.Module, groups: Sequence[Group], plan: Plan) -> None:
        """Undo :meth:`rewrite` in place."""

    def prunable_layers(self, tower: nn.Module) -> list[PrunableLayer]:
        """Return the layers that can be pruned, in order of the blocks."""

    def stages(self, tower: nn.Module) -> Stages:
        """Return the tower as a sequence of blocks."""


P = TypeVar("P", bound=TimmParts)


def timm_family(name: str) -> Callable[[type[P]], type[P]]:
    """Return a decorator that registers the family of a class of parts under ``name``."""

    def decorate(parts: type[P]) -> type[P]:
        FAMILIES.add(name, TimmFamily(name, parts()), parts.__doc__)
        return parts

    return decorate


class TimmFamily:
    """Backbone family made of its parts.

    Args:
        name: Name in the registry of families.
        parts: Members that depend on the trunk.
    """

    library = "open_clip_torch"

    def __init__(self, name: str, parts: TimmParts) -> None:
        self.name, self.parts = name, parts
        self.rewrite, self.finish = parts.rewrite, parts.finish
        self.prunable_layers, self.stages = parts.prunable_layers, parts.stages

    def names(self) -> Sequence[str]:
        """Return open_clip's names of models whose trunk is of the family's modules."""
        return _names(self.parts.modules)

    def takes(self, config: Mapping[str, Any]) -> bool:
        """Return True if open_clip builds a trunk of the family from ``config``."""
        vision = config["vision_cfg"]
        trunk = _trunk(str(vision.get("timm_model_name")))
        return trunk is not None and self.parts.takes(vision, trunk)

    def load(self, name: str, pretrained: str | None, activation: str | None) -> Backbone:
        """Load a model; ``activation`` can only confirm the activation of the network.

        Raises:
            WeightsError: The weights cannot be loaded or do not fit.
            OptionError: ``activation`` is not that of the network.
        """
        # quick_gelu in open_clip's configuration does not change a trunk of timm.
        backbone = self._with_activation(load_clip(self.name, name, pretrained, None))
        if activation not in (None, backbone.activation):
            raise OptionError(
                f"--activation {activation!r}: {name} has {backbone.activation}; leave it out"
            )
        return backbone

    def build(self, dense: DenseModel) -> Backbone:
        """Build the dense tower with random weights, and the CLIP around it if it has texts."""
        if dense.text and has_own_text(dense.architecture):
            return self._with_activation(rebuild_clip(self.name, dense))
        model = nn.ModuleDict({"visual": build_timm_tower(dense.architecture)})
        return self._with_activation(assemble(self.name, dense, model))

    def _with_activation(self, backbone: Backbone) -> Backbone:
        """Set the activation of the prunable blocks: others may have gates with another one."""
        blocks = [
            backbone.tower.get_submodule(layer.block)
            for layer in self.prunable_layers(backbone.tower)
        ]
        (backbone.activation,) = find_activations(m for block in blocks for m in block.modules())
        return backbone


def pools_positions(vision: Mapping[str, Any]) -> bool:
    """Return True if positions are pooled by a mean or a maximum.

    A single position then passes through the pooling unchanged, which the dense output needs.
    """
    pool, projection = vision.get("timm_pool", "avg"), vision.get("timm_proj", "linear")
    # With "", open_clip keeps timm's own pooling if a projection follows it.
    pools = pool in ("avg", "max", "avgmax") or (pool == "" and projection in ("linear", "mlp"))
    return pools and projection in ("linear", "mlp", "none", "", None)


@cache
def _names(modules: tuple[str, ...]) -> tuple[str, ...]:
    import open_clip
    import timm

    configs = {name: open_clip.get_model_config(name) for name in open_clip.list_models()}
    trunks = {n: str(c["vision_cfg"].get("timm_model_name")) for n, c in configs.items()}
    return tuple(
        n for n, trunk in trunks.items() if timm.models.is_model_in_modules(trunk, modules)
    )


@cache
def _trunk(name: str) -> nn.Module | None:
    """Build timm's model of that name on the meta device; None if timm does not know it."""
    import timm

    if not timm.is_model(name):
        return None
    # Only classes and shapes are inspected; no weights are allocated.
    with torch.device("meta"):
        trunk: nn.Module = timm.create_model(name, pretrained=False)
    return trunk
