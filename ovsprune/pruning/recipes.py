"""Recipes: TOML files with the options of a prune and, in ``[base]``, its model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ovsprune.backbones.open_clip_source import OWN_WEIGHTS
from ovsprune.core.config import BASE
from ovsprune.core.errors import OptionError, UnknownNameError
from ovsprune.core.toml import read_toml, to_toml
from ovsprune.pruning.config import PruneConfig
from ovsprune.slim import SlimCheckpoint

__all__ = ["read_base", "recipe_of"]

_BASE_TYPES: Mapping[str, type] = {
    "model": str,
    "pretrained": str,
    "activation": str,
    "dtype": str,
    "text": bool,
}
"""Keys of ``[base]``, which are options of ``ovsprune prune`` too."""


def read_base(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the table ``[base]`` of a recipe: the model, its weights, and the type to save.

    Raises:
        OptionError: The file cannot be read, or a value has another type.
        UnknownNameError: There is no such key; the message names the closest.
    """
    base = read_toml(path, "--config").get(BASE, {})
    if not isinstance(base, dict):
        raise OptionError(f"{path}: {BASE!r} is {base!r}; give a table [{BASE}]")
    for name, value in base.items():
        if name not in _BASE_TYPES:
            raise UnknownNameError(f"key of [{BASE}] in {path}", name, _BASE_TYPES)
        if not isinstance(value, _BASE_TYPES[name]):
            kind = "true or false" if _BASE_TYPES[name] is bool else "a text in quotes"
            raise OptionError(f"{path}: {name} in [{BASE}] is {value!r}; give {kind}")
    return base


def recipe_of(checkpoint: SlimCheckpoint) -> str:
    """Return the recipe that makes a slim checkpoint again, as TOML.

    If the calibration images came from a folder, the recipe holds ``calibration = "folder"``, and
    the folder must be named again. If a slim model was pruned, ``[base]`` names no model.

    Raises:
        OptionError: The criterion was an object given from Python.
    """
    spec = checkpoint.spec
    values = PruneConfig.recorded_options(spec.provenance)
    reason = PruneConfig.unrecorded("criterion", values)
    if reason is not None:
        raise OptionError(f"{checkpoint.path}: the criterion is missing in the recipe: {reason}")
    base: dict[str, Any] = {}
    if "given" not in spec.provenance:  # the base is what was pruned, not its slim result
        base["model"] = spec.base.model
        if spec.base.pretrained not in OWN_WEIGHTS:
            base["pretrained"] = spec.base.pretrained or "none"  # TOML has no null
    tower = [t for name, t in checkpoint.tensors.items() if name.startswith("visual.")]
    dtype = next(t.dtype for t in tower if t.is_floating_point())
    base["dtype"] = str(dtype).removeprefix("torch.")
    if len(tower) == len(checkpoint.tensors):  # the text tower was not saved
        base["text"] = False
    return to_toml(values, {BASE: base})
