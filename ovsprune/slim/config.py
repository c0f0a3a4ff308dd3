"""Serialise and parse the ``config.json`` of a slim checkpoint.

The parser treats its input as untrusted: every field is checked, and unknown fields are refused.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
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

__all__ = ["dump", "field_names", "parse", "parse_costs", "parse_tower", "spec_document", "to_text"]

_WORD = r"[A-Za-z0-9_.-]+"
_VERSION = r"[A-Za-z0-9_.!+-]+"


def dump(spec: SlimSpec) -> str:
    """Return the text of ``config.json``; equal specs give equal text.

    Raises:
        CheckpointError: ``architecture`` or ``provenance`` contain a value that is not plain JSON.
    """
    header = {"format": FORMAT, "format_version": FORMAT_VERSION}
    return to_text({**header, **spec_document(spec)})


def spec_document(spec: Any) -> dict[str, Any]:
    """Return the JSON object of a spec, with the names of its fields in their order.

    Args:
        spec: :class:`~ovsprune.slim.spec.SlimSpec`, or another dataclass that has its fields
            ``base``, ``architecture``, ``files`` and ``provenance``.

    Raises:
        CheckpointError: ``architecture`` or ``provenance`` contain a value that is not plain JSON.
    """
    plain = {
        name: fields.json_value(getattr(spec, name), name)
        for name in ("architecture", "provenance")
    }
    document = dataclasses.asdict(dataclasses.replace(spec, **plain))
    base = document["base"]
    base["tensors"] = dict(sorted(base["tensors"].items()))
    half = base.pop("half")  # optional in the file
    if half:
        base["half"] = dict(sorted(half.items()))
    document["files"] = dict(sorted(document["files"].items()))
    return document


def to_text(document: Mapping[str, Any]) -> str:
    """Return the text of a JSON object, as all config files of checkpoints are written."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def field_names(record: type) -> tuple[str, ...]:
    """Return the names of the fields of a dataclass."""
    return tuple(field.name for field in dataclasses.fields(record))


def parse(document: str | bytes, source: str | Path = CONFIG) -> SlimSpec:
    """Return the spec that the text of a ``config.json`` describes.

    Raises:
        CheckpointError: The text is not valid, or has another format version; the message names
            its origin ``source`` and the field.
    """
    at = str(source)
    data = fields.parse(document, at)
    _check_version(data, at)
    fields.record(data, at, ("format", "format_version", *field_names(SlimSpec)))
    layers = fields.array(data["layers"], f"{at}: layers", _layer)
    names = [layer.name for layer in layers]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise CheckpointError(
            f"{at}: layers contains {', '.join(repeated)} more than once; the file was edited or "
            "damaged: copy or write the checkpoint again"
        )
    return SlimSpec(
        **parse_tower(data, at),
        layers=layers,
        protected=fields.array(data["protected"], f"{at}: protected", fields.text),
        slim=parse_costs(data["slim"], f"{at}: slim"),
    )


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


def parse_tower(data: Mapping[str, Any], at: str) -> dict[str, Any]:
    """Return the fields of a spec that slim and unstructured checkpoints share.

    Args:
        data: Parsed JSON object that has these fields, and may have others.
        at: Location of the object, for messages.

    Raises:
        CheckpointError: A value is not valid; the message names the field.
    """
    return {
        "base": _base(data["base"], f"{at}: base"),
        "family": fields.text(data["family"], f"{at}: family", _WORD),
        "library": fields.text(data["library"], f"{at}: library", _WORD),
        "library_version": fields.text(data["library_version"], f"{at}: library_version", _VERSION),
        "architecture": fields.mapping(data["architecture"], f"{at}: architecture"),
        "activation": fields.choice(data["activation"], f"{at}: activation", ACTIVATIONS),
        "preprocess": _preprocess(data["preprocess"], f"{at}: preprocess"),
        "dense": parse_costs(data["dense"], f"{at}: dense"),
        "files": _files(data["files"], f"{at}: files"),
        "provenance": fields.mapping(data["provenance"], f"{at}: provenance"),
    }


def parse_costs(value: Any, at: str) -> Costs:
    """Return the MACs and parameters that a parsed JSON value states.

    Raises:
        CheckpointError: The value is not valid; the message begins with its location ``at``.
    """
    data = fields.record(value, at, ("macs", "params"))
    return Costs(
        macs=fields.integer(data["macs"], f"{at}.macs", 1),
        params=fields.integer(data["params"], f"{at}.params", 1),
    )


def _layer(value: Any, at: str) -> LayerSpec:
    """Parse an entry of ``layers``."""
    data = fields.record(value, at, field_names(LayerSpec))
    units = fields.integer(data["units"], f"{at}.units", 1)
    kept = fields.integer(data["kept"], f"{at}.kept")
    if kept > units:
        raise fields.invalid(f"{at}.kept", kept, f"at most units = {units}")
    layer = LayerSpec(
        name=fields.text(data["name"], f"{at}.name", fields.DOTTED),
        kind=fields.choice(data["kind"], f"{at}.kind", KINDS),
        block=fields.text(data["block"], f"{at}.block", fields.DOTTED),
        units=units,
        kept=kept,
        unit_width=fields.integer(data["unit_width"], f"{at}.unit_width", 1),
        slices=fields.array(data["slices"], f"{at}.slices", _slice),
    )
    # Attention modules alone can be cut without listed slices (LayerSpec.is_whole_attention).
    if layer.kind in ("mlp", "channels") and not layer.slices:
        raise fields.invalid(f"{at}.slices", [], f"at least one for the kind {layer.kind!r}")
    return layer


def _slice(value: Any, at: str) -> SliceSpec:
    """Parse an entry of a layer's ``slices``."""
    data = fields.record(value, at, field_names(SliceSpec))
    axis: Any = fields.choice(data["axis"], f"{at}.axis", ("out", "in"))
    module = fields.text(data["module"], f"{at}.module", fields.DOTTED)
    return SliceSpec(module, axis, fields.integer(data["offset"], f"{at}.offset"))


def _base(value: Any, at: str) -> BaseSpec:
    """Parse the description of the base model."""
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
    """Parse a map of tensor name to SHA-256."""
    return {
        fields.text(name, f"{at}: a tensor name", fields.DOTTED): fields.text(
            digest, f"{at}.{name}", fields.SHA256
        )
        for name, digest in fields.mapping(value, at).items()
    }


def _files(value: Any, at: str) -> dict[str, FileSpec]:
    """Parse a map of file name to digest and size."""
    files = {}
    for name, entry in fields.mapping(value, at).items():
        fields.text(name, f"{at}: a file name", fields.FILE_NAME)
        data = fields.record(entry, f"{at}.{name}", field_names(FileSpec))
        digest = fields.text(data["sha256"], f"{at}.{name}.sha256", fields.SHA256)
        files[name] = FileSpec(digest, fields.integer(data["bytes"], f"{at}.{name}.bytes"))
    return files


def _preprocess(value: Any, at: str) -> Preprocess:
    """Parse the preprocessing of images."""
    data = fields.record(value, at, field_names(Preprocess))

    height, width = fields.array(data["size"], f"{at}.size", partial(fields.integer, least=1), 2)
    mean: Any = fields.array(data["mean"], f"{at}.mean", fields.number, 3)
    std: Any = fields.array(data["std"], f"{at}.std", fields.number, 3)
    interpolations, modes = ("bicubic", "bilinear"), ("shortest", "squash", "longest")
    return Preprocess(
        size=(height, width),
        mean=mean,
        std=std,
        interpolation=fields.choice(data["interpolation"], f"{at}.interpolation", interpolations),
        resize_mode=fields.choice(data["resize_mode"], f"{at}.resize_mode", modes),
    )
