"""What ``config.json`` of a slim checkpoint says, as frozen records.

The page ``docs/format.md`` and ``schema.json`` beside this file say the same to others.
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
    """Indices of one layer that go with a unit.

    Attributes:
        module: Dotted name of the layer in the tower.
        axis: ``"out"``: rows of the weight, entries of the bias and of a norm's statistics;
            ``"in"``: columns.
        offset: Where unit 0 starts on that axis.
    """

    module: str
    axis: Literal["out", "in"]
    offset: int = 0


@dataclass(frozen=True)
class LayerSpec:
    """One group of units, some of which were cut.

    Attributes:
        name: Unique name; for ``"heads"`` the dotted path of the attention module.
        kind: One of :data:`KINDS`.
        block: Dotted path of the block that holds it.
        units: Units in the base model.
        kept: Units that are left; 0 where the layer is gone, and the consumer's bias stands for it.
        unit_width: Channels that make up one unit (the head width, or 1).
        slices: Unit u covers indices ``offset + u * unit_width`` and on, of each slice. A
            ``"heads"`` layer without any is cut as a whole.
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
        """Whether this is an attention that is cut as a whole, and not slice by slice."""
        return self.kind == "heads" and not self.slices


@dataclass(frozen=True)
class BaseSpec:
    """The dense model that was pruned.

    Attributes:
        model: Its name, as open_clip writes it.
        pretrained: Which weights, or None.
        trained: False if they were random, which a transfer refuses.
        tensors: Canonical tensor name to the SHA-256 of its float32 little-endian bytes.
        half: The same of the tensor rounded to float16, where that differs.
    """

    model: str
    pretrained: str | None
    trained: bool
    tensors: Mapping[str, str]
    half: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FileSpec:
    """What a file of the checkpoint must be: its SHA-256 and its size in bytes."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class SlimSpec:
    """All of ``config.json``.

    Attributes:
        base: The dense model.
        family: Who can build the tower, by our table's name.
        library: The distribution that built it, a name and never something to import.
        library_version: Its version then.
        architecture: The family's own numbers (plain JSON).
        activation: One of :data:`ACTIVATIONS`.
        preprocess: How pictures become input.
        layers: Every group that could be cut, in the order of the blocks.
        protected: Patterns of the groups that were kept whole.
        dense: Costs of the base tower at its native resolution.
        slim: Costs of the slim tower.
        files: File name to digest and size; filled in on writing.
        provenance: How it was made (plain JSON); a reader may ignore it.
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
        """Share of the tower's MACs that was removed, in [0, 1)."""
        return 1.0 - self.slim.macs / self.dense.macs

    def layer(self, name: str) -> LayerSpec:
        """The layer called ``name``.

        Raises:
            KeyError: There is none.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)


def schema() -> dict[str, Any]:
    """The JSON schema of ``config.json`` (draft 2020-12)."""
    found = json.loads(Path(__file__).with_name("schema.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found
