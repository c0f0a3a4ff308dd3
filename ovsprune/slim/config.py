"""Serialise and parse the ``config.json`` of a slim checkpoint.

The parser treats its input as untrusted: every field is checked, and unknown fields are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ovsprune.core.errors import CheckpointError
from ovsprune.core.records import Costs, Preprocess
from ovsprune.slim import fields
from ovsprune.slim.spec import (
    ACTIVATIONS,
    CONFIG,
    FORMAT,
    FORMAT_VERSION,
    KINDS,
    BaseSpec,
    FileSpec,
    LayerSpec,
    SliceSpec,
    SlimSpec,
)

__all__ = [
    "base_document",
    "dump",
    "files_document",
    "parse",
    "parse_base",
    "parse_costs",
    "parse_files",
    "parse_preprocess",
    "preprocess_document",
]

_FIELDS = (
    "format",
    "format_version",
    "base",
    "family",
    "library",
    "library_version",
    "architecture",
    "activation",
    "preprocess",
    "layers",
    "protected",
    "dense",
    "slim",
    "files",
    "provenance",
)


def dump(spec: SlimSpec) -> str:
    """Return the text of ``config.json``; equal specs give equal text.

    Raises:
        CheckpointError: ``architecture`` or ``provenance`` contain a value that is not plain JSON.
    """
    document = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "base": base_document(spec.base),
        "family": spec.family,
        "library": spec.library,
        "library_version": spec.library_version,
        "architecture": fields.json_value(spec.architecture, "architecture"),
        "activation": spec.activation,
        "preprocess": preprocess_document(spec.preprocess),
        "layers": [_layer_document(layer) for layer in spec.layers],
        "protected": list(spec.protected),
        "dense": {"macs": spec.dense.macs, "params": spec.dense.params},
        "slim": {"macs": spec.slim.macs, "params": spec.slim.params},
        "files": files_document(spec.files),
        "provenance": fields.json_value(spec.provenance, "provenance"),
    }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def parse(document: str | bytes, source: str | Path = CONFIG) -> SlimSpec:
    """Return the spec that the text of a ``config.json`` describes.

    Args:
        document: The text.
        source: Where it comes from, for messages.

    Raises:
        CheckpointError: The text is not valid, or has another format version; the message names
            the field.
    """
    at = str(source)
    data = fields.parse(document, at)
    _check_version(data, at)
    fields.record(data, at, _FIELDS)
    architecture, provenance = data["architecture"], data["provenance"]
    for name, value in (("architecture", architecture), ("provenance", provenance)):
        if not isinstance(value, dict):
            raise CheckpointError(f"{at}: {name} is {type(value).__name__}, expected an object")
    spec = SlimSpec(
        base=parse_base(data["base"], f"{at}: base"),
        family=fields.text(data["family"], f"{at}: family", r"[A-Za-z0-9_.-]+"),
        library=fields.text(data["library"], f"{at}: library", r"[A-Za-z0-9_.-]+"),
        library_version=fields.text(
            data["library_version"], f"{at}: library_version", r"[A-Za-z0-9_.!+-]+"
        ),
        architecture=architecture,
        activation=fields.choice(data["activation"], f"{at}: activation", ACTIVATIONS),
        preprocess=parse_preprocess(data["preprocess"], f"{at}: preprocess"),
        layers=tuple(
            _layer(entry, f"{at}: layers[{i}]")
            for i, entry in enumerate(fields.array(data["layers"], f"{at}: layers"))
        ),
        protected=tuple(
            fields.text(entry, f"{at}: protected[{i}]")
            for i, entry in enumerate(fields.array(data["protected"], f"{at}: protected"))
        ),
        dense=parse_costs(data["dense"], f"{at}: dense"),
        slim=parse_costs(data["slim"], f"{at}: slim"),
        files=parse_files(data["files"], f"{at}: files"),
        provenance=provenance,
    )
    _check_names(spec, at)
    return spec


def _check_version(data: Any, at: str) -> None:
    """Refuse another format or format version, before any other field is checked."""
    if isinstance(data, dict) and data.get("format") == "ovsprune-unstructured":
        raise CheckpointError(
            f"{at} describes unstructured masks, expected a slim checkpoint; apply the masks to a "
            "tower with ovsprune.masks.apply_masks, or prune whole units with `ovsprune prune` "
            "(for IMP: `--method imp --imp-structured`)"
        )
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise CheckpointError(
            f'{at} has no "format": "{FORMAT}", so it is not the config of a slim checkpoint; '
            "name a directory that `ovsprune prune` wrote"
        )
    version = fields.integer(data.get("format_version"), f"{at}: format_version", 1)
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{at}: format_version is {version}, this ovsprune reads {FORMAT_VERSION} only; prune "
            "the base model again with this ovsprune, or install one that reads this version"
        )


def _check_names(spec: SlimSpec, at: str) -> None:
    names = [layer.name for layer in spec.layers]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise CheckpointError(
            f"{at}: layers contains {', '.join(double)} more than once; the file was edited or "
            "damaged: copy or write the checkpoint again"
        )


def base_document(base: BaseSpec) -> dict[str, Any]:
    """Return the JSON object that :func:`parse_base` reads."""
    document: dict[str, Any] = {
        "model": base.model,
        "pretrained": base.pretrained,
        "trained": base.trained,
        "tensors": dict(sorted(base.tensors.items())),
    }
    if base.half:
        document["half"] = dict(sorted(base.half.items()))
    return document


def preprocess_document(preprocess: Preprocess) -> dict[str, Any]:
    """Return the JSON object that :func:`parse_preprocess` reads."""
    return {
        "size": list(preprocess.size),
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "interpolation": preprocess.interpolation,
        "resize_mode": preprocess.resize_mode,
    }


def files_document(files: Mapping[str, FileSpec]) -> dict[str, Any]:
    """Return the JSON object that :func:`parse_files` reads."""
    return {
        name: {"sha256": entry.sha256, "bytes": entry.bytes}
        for name, entry in sorted(files.items())
    }


def _layer_document(layer: LayerSpec) -> dict[str, Any]:
    return {
        "name": layer.name,
        "kind": layer.kind,
        "block": layer.block,
        "units": layer.units,
        "kept": layer.kept,
        "unit_width": layer.unit_width,
        "slices": [
            {"module": part.module, "axis": part.axis, "offset": part.offset}
            for part in layer.slices
        ],
    }


def _layer(value: Any, at: str) -> LayerSpec:
    known = ("name", "kind", "block", "units", "kept", "unit_width", "slices")
    data = fields.record(value, at, known)
    units = fields.integer(data["units"], f"{at}.units", 1)
    kept = fields.integer(data["kept"], f"{at}.kept")
    kind = fields.choice(data["kind"], f"{at}.kind", KINDS)
    if kept > units:
        raise CheckpointError(
            f"{at}.kept is {kept}, expected at most units = {units}; the file was edited or "
            "damaged: copy or write the checkpoint again"
        )
    layer = LayerSpec(
        name=fields.text(data["name"], f"{at}.name", fields.DOTTED),
        kind=kind,
        block=fields.text(data["block"], f"{at}.block", fields.DOTTED),
        units=units,
        kept=kept,
        unit_width=fields.integer(data["unit_width"], f"{at}.unit_width", 1),
        slices=tuple(
            _slice(entry, f"{at}.slices[{i}]")
            for i, entry in enumerate(fields.array(data["slices"], f"{at}.slices"))
        ),
    )
    if layer.kind in ("mlp", "channels") and not layer.slices:
        raise CheckpointError(
            f"{at}.slices is empty, expected at least one for the kind {layer.kind!r}; the file "
            "was edited or damaged: copy or write the checkpoint again"
        )
    return layer


def _slice(value: Any, at: str) -> SliceSpec:
    data = fields.record(value, at, ("module", "axis", "offset"))
    axis: Any = fields.choice(data["axis"], f"{at}.axis", ("out", "in"))
    module = fields.text(data["module"], f"{at}.module", fields.DOTTED)
    return SliceSpec(module, axis, fields.integer(data["offset"], f"{at}.offset"))


def parse_base(value: Any, at: str) -> BaseSpec:
    """Return the base model that ``value`` describes.

    Args:
        value: Parsed JSON value.
        at: Location of the value, for messages.

    Raises:
        CheckpointError: ``value`` is not a valid description; the message names the field.
    """
    data = fields.record(value, at, ("model", "pretrained", "trained", "tensors"), ("half",))
    pretrained = data["pretrained"]
    return BaseSpec(
        model=fields.text(data["model"], f"{at}.model"),
        pretrained=None if pretrained is None else fields.text(pretrained, f"{at}.pretrained"),
        trained=fields.boolean(data["trained"], f"{at}.trained"),
        tensors=_digests(data["tensors"], f"{at}.tensors"),
        half=_digests(data.get("half", {}), f"{at}.half"),
    )


def _digests(value: Any, at: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{at} is {type(value).__name__}, expected an object of digests")
    return {
        fields.text(name, f"{at}: a tensor name", fields.DOTTED): fields.text(
            digest, f"{at}.{name}", fields.SHA256
        )
        for name, digest in value.items()
    }


def parse_files(value: Any, at: str) -> dict[str, FileSpec]:
    """Return the digests and sizes of files by name.

    Args:
        value: Parsed JSON value.
        at: Location of the value, for messages.

    Raises:
        CheckpointError: ``value`` is not a valid description; the message names the field.
    """
    if not isinstance(value, dict):
        raise CheckpointError(f"{at} is {type(value).__name__}, expected an object")
    files = {}
    for name, entry in value.items():
        fields.text(name, f"{at}: a file name", fields.FILE_NAME)
        data = fields.record(entry, f"{at}.{name}", ("sha256", "bytes"))
        digest = fields.text(data["sha256"], f"{at}.{name}.sha256", fields.SHA256)
        files[name] = FileSpec(digest, fields.integer(data["bytes"], f"{at}.{name}.bytes"))
    return files


def parse_costs(value: Any, at: str) -> Costs:
    """Return the MACs and parameters that ``value`` states.

    Args:
        value: Parsed JSON value.
        at: Location of the value, for messages.

    Raises:
        CheckpointError: ``value`` is not a valid description; the message names the field.
    """
    data = fields.record(value, at, ("macs", "params"))
    return Costs(
        macs=fields.integer(data["macs"], f"{at}.macs", 1),
        params=fields.integer(data["params"], f"{at}.params", 1),
    )


def parse_preprocess(value: Any, at: str) -> Preprocess:
    """Return the preprocessing that ``value`` describes.

    Args:
        value: Parsed JSON value.
        at: Location of the value, for messages.

    Raises:
        CheckpointError: ``value`` is not a valid description; the message names the field.
    """
    known = ("size", "mean", "std", "interpolation", "resize_mode")
    data = fields.record(value, at, known)
    height, width = (
        fields.integer(x, f"{at}.size", 1) for x in fields.array(data["size"], f"{at}.size", 2)
    )

    def three(name: str) -> tuple[float, float, float]:
        r, g, b = (
            fields.number(x, f"{at}.{name}") for x in fields.array(data[name], f"{at}.{name}", 3)
        )
        return r, g, b

    interpolations, modes = ("bicubic", "bilinear"), ("shortest", "squash", "longest")
    return Preprocess(
        size=(height, width),
        mean=three("mean"),
        std=three("std"),
        interpolation=fields.choice(data["interpolation"], f"{at}.interpolation", interpolations),
        resize_mode=fields.choice(data["resize_mode"], f"{at}.resize_mode", modes),
    )
