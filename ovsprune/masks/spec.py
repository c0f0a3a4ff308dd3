"""Content of the ``config.json`` of an unstructured checkpoint; see ``docs/masks.md``."""

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
"""Note in the config of every unstructured checkpoint."""

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
    """A weight under a mask.

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
        total = 1
        for length in self.shape:
            total *= length
        return total

    @property
    def sparsity(self) -> float:
        """Fraction of the entries that are zero, in [0, 1]."""
        return self.zeros / self.count if self.count else 0.0


@dataclass(frozen=True)
class MaskedSpec:
    """Content of ``config.json``.

    Attributes:
        base: The dense model.
        family: Name of the family that builds the tower.
        library: Distribution that built the tower.
        library_version: Version of that distribution.
        architecture: Numbers that the family builds the tower from (plain JSON).
        activation: Activation function, as in a slim checkpoint.
        preprocess: Preprocessing of images.
        weights: Every weight under a mask, in the order in which the tower uses them.
        excluded: Weights without a mask: the first layer and protected ones.
        dense: Costs of the tower; masks do not change them.
        nonzero: Parameters and MACs without zero weights, as OpenTrans counts them.
        files: Map of file name to digest and size; filled in when written.
        provenance: Record of the pruning (plain JSON).
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
            "architecture": fields.json_value(self.architecture, "architecture"),
            "activation": self.activation,
            "preprocess": config.preprocess_document(self.preprocess),
            "weights": weights,
            "excluded": list(self.excluded),
            "dense": {"macs": self.dense.macs, "params": self.dense.params},
            "nonzero": {"macs": self.nonzero.macs, "params": self.nonzero.params},
            "files": config.files_document(self.files),
            "provenance": fields.json_value(self.provenance, "provenance"),
        }
        return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, document: str | bytes, at: str) -> MaskedSpec:
        """Parse and check ``config.json``.

        Args:
            document: The text.
            at: Its origin, for messages.

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
        fields.record(data, at, _FIELDS)
        fields.choice(data["kind"], f"{at}: kind", ("unstructured",))
        for name in ("architecture", "provenance"):
            if not isinstance(data[name], dict):
                raise CheckpointError(f"{at}: {name} is not an object; copy the file again")
        entries = fields.array(data["weights"], f"{at}: weights")
        weights = tuple(_weight(entry, f"{at}: weights[{i}]") for i, entry in enumerate(entries))
        if not weights or len({w.name for w in weights}) < len(weights):
            raise CheckpointError(f"{at}: weights is empty or lists a name twice; copy it again")
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
    """Parse and check one entry of ``weights``."""
    data = fields.record(value, at, ("name", "shape", "zeros", "sparsity"))
    fields.number(data["sparsity"], f"{at}.sparsity")
    weight = WeightSpec(
        name=fields.text(data["name"], f"{at}.name", fields.DOTTED),
        shape=tuple(
            fields.integer(n, f"{at}.shape", 1) for n in fields.array(data["shape"], f"{at}.shape")
        ),
        zeros=fields.integer(data["zeros"], f"{at}.zeros"),
    )
    if weight.zeros > weight.count:
        raise CheckpointError(
            f"{at}.zeros is {weight.zeros}, expected at most {weight.count}; the file was edited "
            "or damaged: copy it again"
        )
    return weight
