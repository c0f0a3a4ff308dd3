"""Content of the ``config.json`` of an unstructured checkpoint; see ``docs/masks.md``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ovsprune.core.errors import CheckpointError
from ovsprune.core.records import Costs, Preprocess
from ovsprune.slim import config, fields
from ovsprune.slim.spec import BaseSpec, FileSpec

__all__ = ["FORMAT", "FORMAT_VERSION", "MASKS", "NOTE", "MaskedSpec", "WeightSpec"]

FORMAT = "ovsprune-unstructured"
FORMAT_VERSION = 1
_KIND = "unstructured"
MASKS = "masks.safetensors"
NOTE = (
    "Unstructured: single weights are zero, and every tensor keeps its shape. This saves storage, "
    "where the file is compressed, and no time: the tower is as slow as the dense one and takes "
    "as much memory. Non-zero parameters and FLOPs are counts, not costs."
)
"""Note in the config of every unstructured checkpoint."""


@dataclass(frozen=True)
class WeightSpec:
    """Weight under a mask.

    Attributes:
        name: Dotted name of the parameter in the tower.
        shape: Shape of the weight and of its mask.
        zeros: Number of entries that the mask sets to zero.
    """

    name: str
    shape: tuple[int, ...]
    zeros: int

    @property
    def count(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float:
        """Fraction of the entries that are zero, in [0, 1]."""
        return self.zeros / self.count if self.count else 0.0


@dataclass(frozen=True)
class MaskedSpec:
    """Content of ``config.json``; fields not listed are those of a slim checkpoint's spec.

    Attributes:
        weights: Every weight under a mask, in the order in which the tower uses them.
        excluded: Weights without a mask: the first layer and protected ones.
        dense: Costs of the tower; masks do not change them.
        nonzero: Parameters and MACs without zero weights, as OpenTrans counts them.
    """

    base: BaseSpec
    family: str
    library: str
    library_version: str
    architecture: Mapping[str, Any]
    activation: str
    preprocess: Preprocess
    weights: tuple[WeightSpec, ...]
    excluded: tuple[str, ...]
    dense: Costs
    nonzero: Costs
    files: Mapping[str, FileSpec] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Fraction of the weights under masks that are zero, in [0, 1]."""
        return sum(w.zeros for w in self.weights) / sum(w.count for w in self.weights)

    def to_json(self) -> str:
        """Return the text of ``config.json``; equal specs give equal text.

        Raises:
            CheckpointError: ``architecture`` or ``provenance`` contain values that are not JSON.
        """
        document = config.spec_document(self)
        for entry, weight in zip(document["weights"], self.weights, strict=True):
            entry["sparsity"] = weight.sparsity
        header = {"format": FORMAT, "format_version": FORMAT_VERSION, "kind": _KIND, "note": NOTE}
        return config.to_text({**header, **document})

    @classmethod
    def from_json(cls, document: str | bytes, at: str) -> MaskedSpec:
        """Parse and check the text of ``config.json``; ``at`` is its origin, for messages.

        Raises:
            CheckpointError: The text is not a valid spec, or has another format version.
        """
        data = fields.parse(document, at)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise CheckpointError(
                f'{at} has no entry "format": "{FORMAT}", so it is not an unstructured checkpoint; '
                "give a directory that `ovsprune prune --method imp` wrote"
            )
        version = fields.integer(data.get("format_version"), f"{at}: format_version", 1)
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{at}: format_version is {version}, but this version of ovsprune reads "
                f"{FORMAT_VERSION}; install a newer version, or prune again with this one"
            )
        header = ("format", "format_version", "kind", "note")
        fields.record(data, at, (*header, *config.field_names(cls)))
        fields.choice(data["kind"], f"{at}: kind", (_KIND,))
        weights = fields.array(data["weights"], f"{at}: weights", _weight)
        if not weights or len({w.name for w in weights}) < len(weights):
            raise CheckpointError(f"{at}: weights is empty or lists a name twice; copy it again")
        return cls(
            **config.parse_tower(data, at),
            weights=weights,
            excluded=fields.array(
                data["excluded"], f"{at}: excluded", partial(fields.text, pattern=fields.DOTTED)
            ),
            nonzero=config.parse_costs(data["nonzero"], f"{at}: nonzero"),
        )


def _weight(value: Any, at: str) -> WeightSpec:
    """Parse and check one entry of ``weights``."""
    data = fields.record(value, at, ("name", "shape", "zeros", "sparsity"))
    fields.number(data["sparsity"], f"{at}.sparsity")
    weight = WeightSpec(
        name=fields.text(data["name"], f"{at}.name", fields.DOTTED),
        shape=fields.array(data["shape"], f"{at}.shape", partial(fields.integer, least=1)),
        zeros=fields.integer(data["zeros"], f"{at}.zeros"),
    )
    if weight.zeros > weight.count:
        raise fields.invalid(f"{at}.zeros", weight.zeros, f"at most {weight.count}")
    return weight
