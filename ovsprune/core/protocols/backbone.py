"""Backbone families: load an image tower, offer layers to prune, rebuild it from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ovsprune.core.errors import WeightsError
from ovsprune.core.records import DenseModel, Group, Plan, Preprocess, Slice, StreamPoint

__all__ = ["Backbone", "Family", "PrunableLayer", "Stages"]


@dataclass(frozen=True, eq=False)
class Stages:
    """Tower as a sequence of blocks over one residual stream.

    Attributes:
        stem: Maps images [B, 3, H, W] to the residual stream [B, ...].
        blocks: Dotted name to block, in order; each block maps the stream to the stream.
        head: Maps the stream to (pooled [B, C], dense [B, C, h, w]).
    """

    stem: Callable[[Tensor], Tensor]
    blocks: Mapping[str, nn.Module]
    head: Callable[[Tensor], tuple[Tensor, Tensor]]

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pooled [B, C] and dense [B, C, h, w] outputs of images [B, 3, H, W]."""
        stream = self.stem(images)  # [B, ...]
        for block in self.blocks.values():
            stream = block(stream)
        return self.head(stream)


@dataclass(frozen=True)
class PrunableLayer:
    """Layer whose outputs a family allows to prune; the dependency graph adds the coupled layers.

    Attributes:
        name: Name of the group.
        kind: Kind of unit: ``"heads"``, ``"mlp"`` or ``"channels"``.
        layer: Dotted name of the layer (of the rewritten tower) whose outputs are the units.
        unit_width: Number of consecutive outputs that form one unit.
        block: Dotted name of the block.
        stream: Position of the residual stream after the consumer.
        protected: Reason why the layer is not pruned by default, or None.
        consumer: Dotted name of the layer whose columns are scored and refitted. Required if
            several layers read the units, otherwise None.
        extra_slices: Slices to cut with the units that the dependency graph cannot find, because
            they take no part in the computation (a stored index of the units).
    """

    name: str
    kind: str
    layer: str
    unit_width: int
    block: str
    stream: StreamPoint | None
    protected: str | None = None
    consumer: str | None = None
    extra_slices: tuple[Slice, ...] = ()


class Family(Protocol):
    """Backbone family: loads towers, prepares them for pruning, and rebuilds them."""

    library: str
    """Distribution that builds the tower, for messages (``"open_clip_torch"``)."""

    def names(self) -> Sequence[str]:
        """Return the model names that :meth:`load` accepts."""
        ...

    def takes(self, config: Mapping[str, Any]) -> bool:
        """Return True if an open_clip model configuration describes a tower of this family."""
        ...

    def load(self, name: str, pretrained: str | None, activation: str | None) -> Backbone:
        """Build the model and load its weights.

        Args:
            name: Name of the model, or a folder in the format of open_clip.
            pretrained: Tag or file of the weights; None for random weights.
            activation: Activation function to build the model with; None for the model's own.

        Raises:
            WeightsError: The weights cannot be loaded or do not fit the model.
        """
        ...

    def build(self, dense: DenseModel) -> Backbone:
        """Build the dense model of a checkpoint; the tower has random weights.

        Raises:
            WeightsError: The tensors in ``dense.text`` do not fit the model.
        """
        ...

    def rewrite(self, tower: nn.Module) -> None:
        """Replace modules that cannot be cut or refitted, in place; the outputs do not change.

        Fused attention becomes separate linear layers, and a norm after a consumer is folded into
        the consumer. The tower may be the result of :meth:`finish`, to be pruned again.
        """
        ...

    def finish(self, tower: nn.Module, groups: Sequence[Group], plan: Plan) -> None:
        """Undo :meth:`rewrite` in place: insert slim modules for cut parts, restore the others."""
        ...

    def prunable_layers(self, tower: nn.Module) -> list[PrunableLayer]:
        """Return the layers of the rewritten tower that can be pruned, in order of the blocks."""
        ...

    def stages(self, tower: nn.Module) -> Stages:
        """Return the tower (rewritten or not) as a sequence of blocks."""
        ...


@dataclass(eq=False)
class Backbone:
    """Loaded model: the image tower to prune, and the rest of the model.

    Attributes:
        name: Canonical name (``"ViT-B-16"``).
        pretrained: Tag or file name of the weights; None for random weights.
        trained: False if the weights are random.
        family: Name in the registry of families.
        tower: Image tower.
        stages: Returns a tower of this family as a sequence of blocks.
        preprocess: Conversion of images to the tower's input.
        activation: Activation function of the MLPs (``"gelu"``, ``"quick_gelu"``, ...).
        architecture: JSON description from which the library builds the model.
        library_version: Version of the library that built it.
        text: Tensors outside of the tower, by canonical name; empty if there are none.
        encoder: Maps texts to L2-normalised embeddings [K, C]; None without a text tower.
        slim: Slim checkpoint from which the model was read; None for a dense model.
        notes: Remarks on the loading for the user, one line each.
    """

    name: str
    pretrained: str | None
    trained: bool
    family: str
    tower: nn.Module
    stages: Callable[[nn.Module], Stages]
    preprocess: Preprocess
    activation: str
    architecture: dict[str, Any]
    library_version: str
    text: Mapping[str, Tensor]
    encoder: Callable[[Sequence[str]], Tensor] | None = None
    slim: Any = None
    notes: Sequence[str] = ()

    @property
    def has_text(self) -> bool:
        """True if :meth:`encode_text` can be called."""
        return self.encoder is not None

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pooled [B, C] and dense [B, C, h, w] outputs of images [B, 3, H, W]."""
        return self.stages(self.tower).outputs(images)

    @torch.no_grad()
    def pooled(self, images: Tensor) -> Tensor:
        """Return the pooled embeddings [B, C] of images [B, 3, H, W], not normalised."""
        return self.outputs(images)[0]

    @torch.no_grad()
    def dense(self, images: Tensor) -> Tensor:
        """Return the projected patch tokens [B, C, h, w] of images [B, 3, H, W], not normalised."""
        return self.outputs(images)[1]

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Return the L2-normalised embeddings [K, C] of K texts.

        Raises:
            WeightsError: The model has no text tower, or its tokenizer is not installed.
        """
        if self.encoder is None:
            raise WeightsError(
                f"{self.name} was loaded without a text tower; pass class embeddings instead "
                "(--text-embeddings FILE.npz)"
            )
        return self.encoder(texts)
