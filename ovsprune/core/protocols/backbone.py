"""Backbone families: load an image tower, offer layers to prune, rebuild it from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ovsprune.core.records import (
    DenseModel,
    Group,
    Plan,
    Preprocess,
    Slice,
    StreamPoint,
)

__all__ = ["Backbone", "Family", "PrunableLayer", "Stages"]


@dataclass(frozen=True, eq=False)
class Stages:
    """A tower as a sequence of blocks over one residual stream.

    Attributes:
        stem: images [B, 3, H, W] -> stream [B, ...].
        blocks: Dotted name -> block, in order; each maps stream -> stream.
        head: stream -> (pooled [B, C], dense [B, C, h, w]).
    """

    stem: Callable[[Tensor], Tensor]
    blocks: Mapping[str, nn.Module]
    head: Callable[[Tensor], tuple[Tensor, Tensor]]

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled [B, C] and dense [B, C, h, w] outputs of images [B, 3, H, W]."""
        stream = self.stem(images)
        for block in self.blocks.values():
            stream = block(stream)
        return self.head(stream)


@dataclass(frozen=True)
class PrunableLayer:
    """Where a family offers to cut; the dependency graph finds what must go along.

    Attributes:
        name: Name of the group.
        kind: Unit kind.
        layer: Dotted name of a layer (of the rewritten tower) whose outputs are the units.
        unit_width: Consecutive outputs that make one unit.
        block: Dotted name of the block.
        stream: Where the residual stream is read after the consumer.
        protected: Why it is not offered by default, or None.
        consumer: Dotted name of the layer whose columns are ranked and refitted, where several
            layers read the units; None where one does.
        along: Slices that go along and that no graph sees: an index of the units, which is no part
            of what is computed.
    """

    name: str
    kind: str
    layer: str
    unit_width: int
    block: str
    stream: StreamPoint | None
    protected: str | None = None
    consumer: str | None = None
    along: tuple[Slice, ...] = ()


class Family(Protocol):
    """A backbone family: how its towers load, come apart, and go together again."""

    library: str
    """Distribution that builds the tower, for messages (``"open_clip_torch"``)."""

    def names(self) -> Sequence[str]:
        """Names that :meth:`load` takes."""
        ...

    def takes(self, config: Mapping[str, Any]) -> bool:
        """Whether a model configuration of open_clip's describes a tower of this family."""
        ...

    def load(self, name: str, pretrained: str | None, activation: str | None) -> Backbone:
        """Build the model and load its weights; ``name`` may be a folder of open_clip's form.

        Raises:
            WeightsError: The weights cannot be had, or do not fit.
        """
        ...

    def build(self, dense: DenseModel) -> Backbone:
        """Build the dense backbone that a checkpoint was made from, its tower with random weights.

        Raises:
            WeightsError: ``dense.text`` does not fit.
        """
        ...

    def rewrite(self, tower: nn.Module) -> None:
        """Replace, in place, what cannot be cut or refitted as it is; the outputs stay.

        Fused attention becomes separate linear maps, and a norm behind a consumer is folded into
        it. The tower may have been finished as a slim one before: it can be pruned again.
        """
        ...

    def finish(self, tower: nn.Module, groups: Sequence[Group], plan: Plan) -> None:
        """Replace, in place, what :meth:`rewrite` put in by slim modules, or by what was there."""
        ...

    def prunable_layers(self, tower: nn.Module) -> list[PrunableLayer]:
        """Where the rewritten tower can be cut, in order of the blocks."""
        ...

    def stages(self, tower: nn.Module) -> Stages:
        """The tower (rewritten or not) as a sequence of blocks."""
        ...


@dataclass(eq=False)
class Backbone:
    """A loaded model: the image tower that is pruned, and what stands around it.

    Attributes:
        name: Canonical name (``"ViT-B-16"``).
        pretrained: Tag, file name, or None for untrained weights.
        trained: False when the weights are random.
        family: Name in the registry of families.
        tower: The image tower.
        preprocess: How pictures become its input.
        activation: ``"gelu"``, ``"quick_gelu"``, ...
        architecture: JSON description from which the library builds the model.
        library_version: Version of the library that built it.
        text: State of everything but the tower, by canonical name; empty when there is none.
        encoder: texts -> [K, C] L2-normalised, or None without a text tower.
        slim: The slim checkpoint that this was read from, or None for a dense model.
        notes: What a user should know about how it was loaded, a line each.
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
        """Whether :meth:`encode_text` works."""
        return self.encoder is not None

    def outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled [B, C] and dense [B, C, h, w] outputs of images [B, 3, H, W]."""
        return self.stages(self.tower).outputs(images)

    @torch.no_grad()
    def pooled(self, images: Tensor) -> Tensor:
        """Pooled image embedding [B, C] of images [B, 3, H, W], not normalised."""
        return self.outputs(images)[0]

    @torch.no_grad()
    def dense(self, images: Tensor) -> Tensor:
        """Projected patch tokens [B, C, h, w] of images [B, 3, H, W], not normalised."""
        return self.outputs(images)[1]

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """Text embeddings [K, C], L2-normalised.

        Raises:
            WeightsError: The model has no text tower, or its tokenizer is not here.
        """
        from ovsprune.core.errors import WeightsError

        if self.encoder is None:
            raise WeightsError(
                f"{self.name} has no text tower here; give class embeddings instead "
                "(--text-embeddings FILE.npz)"
            )
        return self.encoder(texts)
