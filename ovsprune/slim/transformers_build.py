"""Build models of transformers from a class name in a fixed table and plain configuration values.

A checkpoint cannot name other classes or bring code. The library is not imported before a model is
built. The functions raise a ``MissingLibraryError`` if it is not installed or too old for the
class, and a ``CheckpointError`` if it cannot build the class.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ovsprune.core.errors import CheckpointError, MissingLibraryError
from ovsprune.slim.transformers_tower import TOWER_LAYOUTS, TransformersTower

__all__ = [
    "TWO_TOWER_CLASSES",
    "build_model",
    "build_tower",
    "describe_architecture",
    "transformers_library",
]

TWO_TOWER_CLASSES = {
    "CLIPModel": "CLIPVisionModelWithProjection",
    "SiglipModel": "SiglipVisionModel",
    "Siglip2Model": "Siglip2VisionModel",
}
"""Class of a model with image and text tower -> class of its image tower alone."""


def transformers_library() -> Any:
    """Import and return the library."""
    try:
        # imported by name: ovsprune.slim must not depend on a framework
        return importlib.import_module("transformers")
    except ImportError as error:
        raise MissingLibraryError(
            f"building this tower needs transformers ({error}); `pip install transformers`, or "
            "build the tower yourself and call ovsprune.apply"
        ) from error


def describe_architecture(model_class: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a model by its class and the values of its configuration, as plain JSON.

    Args:
        model_class: A class in :data:`~ovsprune.slim.transformers_tower.TOWER_LAYOUTS` or
            :data:`TWO_TOWER_CLASSES`.
        config: Content of its ``config.json``. Entries that do not belong to the architecture
            (code to import, choice of kernels) are dropped.
    """
    return {"class": model_class, "config": _declared_values(_config(model_class, config))}


def build_model(architecture: Mapping[str, Any]) -> nn.Module:
    """Build the model that :func:`describe_architecture` described, with fixed random weights."""
    name, values = architecture.get("class"), architecture.get("config")
    if not isinstance(name, str) or not isinstance(values, Mapping):
        raise CheckpointError(
            "the architecture needs the entries class and config of a model of transformers; copy "
            "the checkpoint again, or write it again from the pruned model"
        )
    # describe again: the values come from a file and may hold entries that are no architecture
    plain = describe_architecture(name, values)["config"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model: nn.Module = getattr(transformers_library(), name)(_config(name, plain))
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise _build_error(name, error) from error
    return model.eval().requires_grad_(False)


def build_tower(architecture: Mapping[str, Any]) -> TransformersTower:
    """Build the image tower of an architecture; a text tower in it is ignored."""
    name, config = architecture.get("class"), architecture.get("config")
    if name in TWO_TOWER_CLASSES and isinstance(config, Mapping):
        vision = config.get("vision_config")
        if not isinstance(vision, Mapping):
            raise CheckpointError(
                f"the architecture of {name} has no vision_config; copy the checkpoint again, or "
                "write it again from the pruned model"
            )
        projection = {k: config[k] for k in ("projection_dim",) if k in config}
        architecture = {"class": TWO_TOWER_CLASSES[name], "config": {**vision, **projection}}
    return TransformersTower(build_model(architecture))


def _config(model_class: str, config: Mapping[str, Any]) -> Any:
    """Build the configuration object of a model class."""
    if model_class not in TOWER_LAYOUTS and model_class not in TWO_TOWER_CLASSES:
        raise CheckpointError(
            f"this ovsprune cannot build the transformers class {model_class[:80]!r}; supported "
            f"classes: {', '.join([*TOWER_LAYOUTS, *TWO_TOWER_CLASSES])}"
        )
    library = transformers_library()
    min_version = TOWER_LAYOUTS[TWO_TOWER_CLASSES.get(model_class, model_class)].min_version
    if tuple(int(part) for part in library.__version__.split(".")[:2]) < min_version:
        version = ".".join(map(str, min_version))
        raise MissingLibraryError(
            f"{model_class} of transformers {library.__version__} does not support removed heads; "
            f"`pip install 'transformers>={version}'`"
        )
    # taken from the model class, so that a configuration cannot name another class
    config_class = getattr(library, model_class).config_class
    try:
        return config_class(**config)
    except Exception as error:  # validation errors of the library have no common base
        raise _build_error(model_class, error) from error


def _declared_values(config: Any) -> dict[str, Any]:
    """Return the values that the class of a configuration declares, without inherited ones."""
    values = {}
    for name in inspect.get_annotations(type(config)):
        if not name.startswith("_"):
            value = getattr(config, name)
            values[name] = _declared_values(value) if hasattr(value, "to_dict") else value
    return values


def _build_error(name: str, error: Exception) -> CheckpointError:
    """Return the error for a class that transformers cannot build."""
    reason = " ".join(str(error).split())[:200]  # messages of the library span many lines
    return CheckpointError(
        f"the installed transformers cannot build this {name} ({reason}); install the library "
        "version that the config of the checkpoint names"
    )
