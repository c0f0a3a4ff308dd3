"""What ``config.json`` of a slim checkpoint says, as frozen records.

The page ``docs/format.md`` and ``schema.json`` beside this file say the same to others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ovsprune.core.records import Costs, Preprocess

__all__ = [
    "ACTIVATIONS",
    "CARD",
    "CONFIG",
    "FORMAT",
    "FORMAT_VERSIONS",
    "KINDS",
    "MASK",
    "MODEL",
    "STREAM_KINDS",
    "WIDTH_KINDS",
    "BaseSpec",
    "FileSpec",
    "LayerSpec",
    "SliceSpec",
    "SlimSpec",
    "interface_of",
    "schema",
    "version_of",
]

FORMAT = "ovsprune-slim"
FORMAT_VERSIONS = (1, 2, 3)

CONFIG = "config.json"
MODEL = "model.safetensors"
MASK = "mask.safetensors"
CARD = "README.md"

WIDTH_KINDS = ("qk", "vo")
"""Directions inside the heads of an attention; new in version 2 of the format."""
STREAM_KINDS = {"width": "prune_width", "stage": "prune_stages"}
"""Channels of a residual stream, through the tower or one of its stages, to the setting that offers
them; new in version 3 of the format. What reads the stream from outside must fit."""
KINDS = ("heads", "mlp", "channels", *WIDTH_KINDS, *STREAM_KINDS)
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_tanh", "relu", "relu6", "silu")


@dataclass(frozen=True)
class SliceSpec:
    """Indices of one layer that go with a unit.

    Attributes:
        module: Dotted name of the layer in the tower. Of a residual stream it may also be an
            attention (``"in"``: columns of queries, keys and values; ``"out"``: rows of the out
            projection), or a parameter that is no layer's (``"out"``: its last axis; ``"in"``: its
            first).
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
        name: Unique name; for ``"heads"`` the dotted path of the attention module, for ``"qk"`` and
            ``"vo"`` that path, a dot and the kind.
        kind: One of :data:`KINDS`.
        block: Dotted path of the block that holds it.
        units: Units in the base model.
        kept: Units that are left; 0 where the layer is gone, and the consumer's bias stands for it.
        unit_width: Channels that make up one unit (the head width, or 1), for ``"qk"`` and ``"vo"``
            in each head.
        slices: Unit u covers indices ``offset + u * unit_width`` and on, of each slice. A
            ``"heads"`` layer without any is cut as a whole, and directions have none.
    """

    name: str
    kind: str
    block: str
    units: int
    kept: int
    unit_width: int
    slices: tuple[SliceSpec, ...] = ()

    @property
    def whole(self) -> bool:
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
        format_version: Version of the format; :func:`version_of` the layers.
        interface: Names of the layers by which the tower's interface has changed, residual streams
            that are narrower than the base's; :func:`interface_of` the layers.
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
    format_version: int = 1
    interface: tuple[str, ...] = ()

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

    def head_widths(self, layer: LayerSpec) -> tuple[int, int]:
        """Width of the queries and keys, and of the values, that a head of ``layer`` has here."""
        kept = {other.name: other.kept for other in self.layers}
        qk, vo = (kept.get(f"{layer.name}.{kind}", layer.unit_width) for kind in WIDTH_KINDS)
        return qk, vo

    def turned(self) -> tuple[LayerSpec, ...]:
        """The layers that lost directions inside their heads: those that have a basis."""
        return tuple(x for x in self.layers if x.kind in WIDTH_KINDS and x.kept < x.units)

    def streams(self) -> tuple[LayerSpec, ...]:
        """The residual streams that lost channels: the layers that :attr:`interface` names."""
        return tuple(self.layer(name) for name in self.interface)

    def to_json(self) -> str:
        """The text of ``config.json``; equal specs give equal text.

        Raises:
            CheckpointError: ``architecture`` or ``provenance`` hold what JSON cannot.
        """
        from ovsprune.slim import config

        return config.dump(self)

    @classmethod
    def from_json(cls, document: str | bytes, source: str | Path = CONFIG) -> SlimSpec:
        """The spec that ``document`` says.

        Args:
            document: Text of a ``config.json``.
            source: Where it comes from, for messages.

        Raises:
            CheckpointError: It is not a valid one, or of a format version that this ovsprune does
                not know; the message names the field.
        """
        from ovsprune.slim import config

        return config.parse(document, str(source))


def version_of(layers: Iterable[LayerSpec]) -> int:
    """The earliest version of the format that can say ``layers``."""
    layers = tuple(layers)
    if any(x.kind in STREAM_KINDS for x in layers):
        return 3
    new = (
        x.kind in WIDTH_KINDS or not x.kept or (x.kind == "heads" and not x.whole) for x in layers
    )
    return 2 if any(new) else 1


def interface_of(layers: Iterable[LayerSpec]) -> tuple[str, ...]:
    """Names of the residual streams among ``layers`` that lost channels."""
    return tuple(x.name for x in layers if x.kind in STREAM_KINDS and x.kept < x.units)


def schema() -> dict[str, Any]:
    """The JSON schema of ``config.json`` (draft 2020-12)."""
    found = json.loads(Path(__file__).with_name("schema.json").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found
