"""What ``config.json`` of an unstructured result says; ``docs/masks.md`` says the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ovsprune.core.errors import CheckpointError
from ovsprune.core.records import Costs, Preprocess
from ovsprune.slim import config, fields
from ovsprune.slim.spec import ACTIVATIONS, BaseSpec, FileSpec

__all__ = ["FORMAT", "FORMAT_VERSION", "MASKS", "NOTE", "MaskedSpec", "WeightSpec"]

FORMAT = "ovsprune-unstructured"
FORMAT_VERSION = 1
MASKS = "masks.safetensors"
NOTE = (
    "Unstructured: single weights are zero, and every tensor keeps its shape. This saves storage, "
    "where the file is compressed, and no time: the tower is as slow as the dense one and takes "
    "as much memory. Non-zero parameters and FLOPs are counts, not costs."
)
"""What every unstructured result says of itself."""

_FIELDS = (
    "format",
    "format_version",
    "kind",
    "note",
    "base",
    "family",
    "library",
    "library_version",
    "architecture",
    "activation",
    "preprocess",
    "weights",
    "excluded",
    "dense",
    "nonzero",
    "files",
    "provenance",
)


@dataclass(frozen=True)
class WeightSpec:
    """One weight under a mask.

    Attributes:
        name: Its parameter's dotted name in the tower.
        shape: Of the weight and of its mask.
        zeros: How many entries the mask sets to zero.
    """

    name: str
    shape: tuple[int, ...]
    zeros: int

    @property
    def count(self) -> int:
        """Number of entries."""
        total = 1
        for length in self.shape:
            total *= length
        return total

    @property
    def sparsity(self) -> float:
        """Share of the entries that is zero, in [0, 1]."""
        return self.zeros / self.count if self.count else 0.0


@dataclass(frozen=True)
class MaskedSpec:
    """All of ``config.json``.

    Attributes:
        base: The dense model whose weights these were before pruning.
        family: Who can build the tower, by our table's name.
        library: The distribution that built it.
        library_version: Its version then.
        architecture: The family's own numbers (plain JSON).
        activation: As in a slim checkpoint.
        preprocess: How pictures become input.
        weights: Every weight under a mask, in the order in which the tower uses them.
        excluded: Weights that were kept out of the ranking: the first layer, and protected ones.
        dense: Costs of the tower; those of the masked one are the same.
        nonzero: Parameters and MACs without those of zero weights, as the paper counts.
        files: File name to digest and size; filled in on writing.
        provenance: How it was made (plain JSON).
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
        """Share of the weights under masks that is zero, in [0, 1]."""
        return sum(w.zeros for w in self.weights) / sum(w.count for w in self.weights)

    def to_json(self) -> str:
        """The text of ``config.json``; equal specs give equal text.

        Raises:
            CheckpointError: ``architecture`` or ``provenance`` hold what JSON cannot.
        """
        weights = [
            {"name": w.name, "shape": list(w.shape), "zeros": w.zeros, "sparsity": w.sparsity}
            for w in self.weights
        ]
        document = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "kind": "unstructured",
            "note": NOTE,
            "base": config.base_document(self.base),
            "family": self.family,
            "library": self.library,
            "library_version": self.library_version,
            "architecture": fields.free(self.architecture, "architecture"),
            "activation": self.activation,
            "preprocess": config.preprocess_document(self.preprocess),
            "weights": weights,
            "excluded": list(self.excluded),
            "dense": {"macs": self.dense.macs, "params": self.dense.params},
            "nonzero": {"macs": self.nonzero.macs, "params": self.nonzero.params},
            "files": config.files_document(self.files),
            "provenance": fields.free(self.provenance, "provenance"),
        }
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, document: str | bytes, at: str) -> MaskedSpec:
        """The spec that ``document`` says, ``at`` being where it comes from.

        Raises:
            CheckpointError: It is not a valid one, or of another format version.
        """
        data = fields.parse(document, at)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise CheckpointError(
                f'{at} does not say "format": "{FORMAT}", so this is no unstructured result; name '
                "a directory that `ovsprune prune --method imp` wrote"
            )
        version = fields.whole(data.get("format_version"), f"{at}: format_version", 1)
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{at}: format_version is {version}, this ovsprune reads {FORMAT_VERSION}; install "
                "a newer ovsprune, or prune again with this one"
            )
        fields.record(data, at, _FIELDS)
        fields.choice(data["kind"], f"{at}: kind", ("unstructured",))
        for name in ("architecture", "provenance"):
            if not isinstance(data[name], dict):
                raise CheckpointError(f"{at}: {name} is no object; copy the file again")
        items = fields.array(data["weights"], f"{at}: weights")
        weights = tuple(_weight(item, f"{at}: weights[{i}]") for i, item in enumerate(items))
        if not weights or len({w.name for w in weights}) < len(weights):
            raise CheckpointError(f"{at}: weights is empty, or has a name twice; copy it again")
        return cls(
            base=config.parse_base(data["base"], f"{at}: base"),
            family=fields.text(data["family"], f"{at}: family", r"[A-Za-z0-9_.-]+"),
            library=fields.text(data["library"], f"{at}: library", r"[A-Za-z0-9_.-]+"),
            library_version=fields.text(
                data["library_version"], f"{at}: library_version", r"[A-Za-z0-9_.!+-]+"
            ),
            architecture=data["architecture"],
            activation=fields.choice(data["activation"], f"{at}: activation", ACTIVATIONS),
            preprocess=config.parse_preprocess(data["preprocess"], f"{at}: preprocess"),
            weights=weights,
            excluded=tuple(
                fields.text(item, f"{at}: excluded[{i}]", fields.DOTTED)
                for i, item in enumerate(fields.array(data["excluded"], f"{at}: excluded"))
            ),
            dense=config.parse_costs(data["dense"], f"{at}: dense"),
            nonzero=config.parse_costs(data["nonzero"], f"{at}: nonzero"),
            files=config.parse_files(data["files"], f"{at}: files"),
            provenance=data["provenance"],
        )


def _weight(value: Any, at: str) -> WeightSpec:
    data = fields.record(value, at, ("name", "shape", "zeros", "sparsity"))
    fields.number(data["sparsity"], f"{at}.sparsity")
    found = WeightSpec(
        name=fields.text(data["name"], f"{at}.name", fields.DOTTED),
        shape=tuple(
            fields.whole(n, f"{at}.shape", 1) for n in fields.array(data["shape"], f"{at}.shape")
        ),
        zeros=fields.whole(data["zeros"], f"{at}.zeros"),
    )
    if found.zeros > found.count:
        raise CheckpointError(
            f"{at}.zeros is {found.zeros}, expected at most {found.count}; the file was edited or "
            "damaged: copy it again"
        )
    return found
