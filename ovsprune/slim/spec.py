"""Content of a slim checkpoint's ``config.json``, as frozen records.

``docs/format.md`` describes the same format in words, ``schema.json`` in this directory as a JSON
schema.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ovsprune.core.records import Costs, Preprocess

__all__ = [
    "ACTIVATIONS",
    "CARD",
    "CONFIG",
    "FORMAT",
    "FORMAT_VERSION",
    "KINDS",
    "MASK",
    "MODEL",
    "BaseSpec",
    "FileSpec",
    "LayerSpec",
    "SliceSpec",
    "SlimSpec",
    "schema",
]

FORMAT = "ovsprune-slim"
FORMAT_VERSION = 1

CONFIG = "config.json"
MODEL = "model.safetensors"
MASK = "mask.safetensors"
CARD = "README.md"

KINDS = ("heads", "mlp", "channels")
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_tanh", "relu", "relu6", "silu")


@dataclass(frozen=True)
class SliceSpec:
    """Indices of one layer that belong to the units of a group.

    Attributes:
        module: Dotted name of the layer in the tower.
        axis: ``"out"``: rows of the weight, entries of the bias and of a norm's statistics;
            ``"in"``: columns.
        offset: First index of unit 0 on that axis.
    """

    module: str
    axis: Literal["out", "in"]
    offset: int = 0


@dataclass(frozen=True)
class LayerSpec:
    """Group of units, of which some may have been removed.

    Attributes:
        name: Unique name; for ``"heads"`` the dotted path of the attention module.
        kind: One of :data:`KINDS`.
        block: Dotted path of the block that contains the group.
        units: Number of units in the base model.
        kept: Number of units that were kept. With 0, the consumer outputs its bias.
        unit_width: Number of channels per unit (the head width, or 1).
        slices: In each slice, unit u has the ``unit_width`` indices from ``offset + u *
            unit_width`` on. A ``"heads"`` group without slices is an attention module whose
            projections are cut by head.
    """

    name: str
    kind: str
    block: str
    units: int
    kept: int
    unit_width: int
    slices: tuple[SliceSpec, ...] = ()

    @property
    def is_whole_attention(self) -> bool:
        """True for an attention module that is cut by head, without listed slices."""
        return self.kind == "heads" and not self.slices


@dataclass(frozen=True)
class BaseSpec:
    """Dense model that was pruned.

    Attributes:
        model: Name of the model in open_clip's spelling.
        pretrained: Tag or file name of the weights, or None.
        trained: False if the weights were random; ``transfer`` refuses such a checkpoint.
        tensors: Canonical tensor name to the SHA-256 of its float32 little-endian bytes.
        half: The same for the tensor rounded to float16, only for tensors that rounding changes.
    """

    model: str
    pretrained: str | None
    trained: bool
    tensors: Mapping[str, str]
    half: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FileSpec:
    """Digest and size of a file of the checkpoint.

    Attributes:
        sha256: SHA-256 of its content, in hexadecimal.
        bytes: Size in bytes.
    """

    sha256: str
    bytes: int


@dataclass(frozen=True)
class SlimSpec:
    """Content of ``config.json``.

    Attributes:
        base: Dense model that was pruned.
        family: Name of the backbone family, which selects the builder of the tower.
        library: Distribution that built the tower; for messages only, it is never imported.
        library_version: Version of that distribution.
        architecture: Parameters of the architecture, specific to the family (plain JSON).
        activation: One of :data:`ACTIVATIONS`.
        preprocess: Conversion of images to the tower's input.
        layers: All groups that could be cut, in the order of the blocks.
        protected: Patterns of the groups that were excluded from pruning.
        dense: Costs of the base tower at its native resolution.
        slim: Costs of the slim tower.
        files: File name to digest and size; set by :func:`ovsprune.slim.write.write`.
        provenance: Record of how the checkpoint was made (plain JSON); a reader may ignore it.
    """

    base: BaseSpec
    family: str
    library: str
    library_version: str
    architecture: Mapping[str, Any]
    activation: str
    preprocess: Preprocess
    layers: tuple[LayerSpec, ...]
    protected: tuple[str, ...]
    dense: Costs
    slim: Costs
    files: Mapping[str, FileSpec] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Fraction of the tower's MACs that was removed, in [0, 1)."""
        return 1.0 - self.slim.macs / self.dense.macs

    def layer(self, name: str) -> LayerSpec:
        """Return the group called ``name``.

        Raises:
            KeyError: There is no such group.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)


def schema() -> dict[str, Any]:
    """Return the JSON schema of ``config.json`` (draft 2020-12)."""
    document = json.loads(Path(__file__).with_name("schema.json").read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document
