"""Contents of a slim checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ovsprune.report.card import is_protected
from ovsprune.slim.read import read
from ovsprune.slim.spec import FORMAT_VERSION

__all__ = ["inspect"]


def inspect(directory: str | Path, *, recipe: str | Path | None = None) -> dict[str, Any]:
    """Read and check a slim checkpoint, and return its contents layer by layer.

    Args:
        directory: Slim checkpoint.
        recipe: TOML file to write, with the options that made the checkpoint.

    Returns:
        ``format, base{model, pretrained, trained, tensors}, dense{macs, params},
        slim{macs, params}, ratio, layers[{name, kind, block, units, kept, protected, unit_width,
        indices}], family, library, library_version, architecture, activation,
        preprocess, protected, provenance, files, bytes, path``.

    Raises:
        CheckpointError: The directory is damaged, incomplete, or no slim checkpoint.
        OptionError: The recipe cannot be written: the criterion was an object given from Python.
        OutputError: ``recipe`` cannot be written.
    """
    checkpoint = read(Path(directory))
    if recipe is not None:
        from ovsprune.core.files import write_text
        from ovsprune.pruning.recipes import recipe_of

        write_text(Path(recipe), recipe_of(checkpoint))
    spec = checkpoint.spec
    layers = [
        {
            "name": layer.name,
            "kind": layer.kind,
            "block": layer.block,
            "units": layer.units,
            "kept": layer.kept,
            "unit_width": layer.unit_width,
            "protected": is_protected(spec, layer),
            "indices": checkpoint.mask[layer.name].tolist(),  # of units in the base model
        }
        for layer in spec.layers
    ]
    return {
        "path": str(checkpoint.path),
        "format": FORMAT_VERSION,
        "base": {
            "model": spec.base.model,
            "pretrained": spec.base.pretrained,
            "trained": spec.base.trained,
            "tensors": len(spec.base.tensors),
        },
        "dense": dataclasses.asdict(spec.dense),
        "slim": dataclasses.asdict(spec.slim),
        "ratio": spec.ratio,
        "layers": layers,
        "protected": list(spec.protected),
        "family": spec.family,
        "library": spec.library,
        "library_version": spec.library_version,
        "architecture": dict(spec.architecture),
        "activation": spec.activation,
        "preprocess": {
            # Lists, so that the record is equal to its JSON.
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(spec.preprocess).items()
        },
        "provenance": dict(spec.provenance),
        "files": {name: dataclasses.asdict(entry) for name, entry in spec.files.items()},
        # `files` lists neither config.json, which contains the list, nor the model card.
        "bytes": sum(file.stat().st_size for file in checkpoint.path.iterdir() if file.is_file()),
    }
