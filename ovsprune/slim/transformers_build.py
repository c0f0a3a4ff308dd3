"""Building models of transformers: by a class of our own table, from numbers, never from code.

Nothing of the library is imported until a model is asked for.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ovsprune.core.errors import CheckpointError, MissingLibraryError
from ovsprune.slim.narrowing import build_narrowed
from ovsprune.slim.read import SlimCheckpoint
from ovsprune.slim.transformers_tower import TOWER_LAYOUTS, TransformersTower

__all__ = [
    "TWO_TOWER_CLASSES",
    "build_model",
    "build_tower",
    "describe_architecture",
    "narrow_tower",
    "transformers_library",
]

TWO_TOWER_CLASSES = {
    "CLIPModel": "CLIPVisionModelWithProjection",
    "SiglipModel": "SiglipVisionModel",
    "Siglip2Model": "Siglip2VisionModel",
}
"""Models with a text tower, and the class of their vision tower."""


def transformers_library() -> Any:
    """The library, imported.

    Raises:
        MissingLibraryError: It is not installed.
    """
    try:
        # by name, so that this room imports no framework until somebody asks for one
        library = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingLibraryError(
            f"this tower is built by transformers ({error}); `pip install transformers`, or "
            "build it yourself and call ovsprune.apply"
        ) from error
    return library


def describe_architecture(model_class: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a spec says of a model: its class and the numbers of its configuration, as plain JSON.

    Args:
        model_class: A class in :data:`~ovsprune.slim.transformers_tower.TOWER_LAYOUTS` or :data:`TWO_TOWER_CLASSES`.
        config: What its ``config.json`` says; entries that are no numbers of the architecture
            (code to import, ways to compute) are left out.

    Raises:
        CheckpointError: The library refuses the configuration, or the class is in no table.
    """
    return {"class": model_class, "config": _numbers(_config(model_class, config))}


def build_model(architecture: Mapping[str, Any]) -> nn.Module:
    """The model that an architecture describes, with random weights from a fixed seed.

    Args:
        architecture: From :func:`describe_architecture`.

    Raises:
        MissingLibraryError: transformers is not installed, or too old.
        CheckpointError: It cannot build this.
    """
    name, numbers = architecture.get("class"), architecture.get("config")
    if not isinstance(name, str) or not isinstance(numbers, Mapping):
        raise CheckpointError(
            "the architecture names no class with a configuration of transformers; copy or write "
            "the checkpoint again"
        )
    plain = describe_architecture(name, numbers)["config"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model: nn.Module = getattr(transformers_library(), name)(_config(name, plain))
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise _refused(name, error) from error
    return model.eval().requires_grad_(False)


def build_tower(architecture: Mapping[str, Any]) -> TransformersTower:
    """The vision tower that an architecture describes, of a model with a text tower too.

    Raises:
        MissingLibraryError: transformers is not installed, or too old.
        CheckpointError: It cannot build this.
    """
    name, config = architecture.get("class"), architecture.get("config")
    if name in TWO_TOWER_CLASSES and isinstance(config, Mapping):
        vision = config.get("vision_config")
        if not isinstance(vision, Mapping):
            raise CheckpointError(
                f"the architecture of {name} has no vision_config; copy or write the checkpoint "
                "again"
            )
        width = {k: config[k] for k in ("projection_dim",) if k in config}
        architecture = {"class": TWO_TOWER_CLASSES[name], "config": {**vision, **width}}
    return TransformersTower(build_model(architecture))


def narrow_tower(checkpoint: SlimCheckpoint) -> nn.Module:
    """A tower of the widths of ``checkpoint``, without its weights.

    Raises:
        MissingLibraryError: transformers is not installed.
        CheckpointError: The config does not describe such a tower.
    """
    return build_narrowed(checkpoint, partial(build_tower, checkpoint.spec.architecture))


def _config(model_class: str, config: Mapping[str, Any]) -> Any:
    if model_class not in TOWER_LAYOUTS and model_class not in TWO_TOWER_CLASSES:
        raise CheckpointError(
            f"{model_class[:80]!r} is no class of transformers' that this ovsprune builds; it "
            f"builds {', '.join([*TOWER_LAYOUTS, *TWO_TOWER_CLASSES])}"
        )
    library = transformers_library()
    since = TOWER_LAYOUTS[TWO_TOWER_CLASSES.get(model_class, model_class)].since
    if tuple(int(part) for part in library.__version__.split(".")[:2]) < since:
        version = ".".join(map(str, since))
        raise MissingLibraryError(
            f"transformers {library.__version__} builds {model_class} in another way than later "
            f"versions, one that cannot have fewer heads; `pip install 'transformers>={version}'`"
        )
    # of transformers' own: a configuration cannot name another class
    config_class = getattr(library, model_class).config_class
    try:
        return config_class(**config)
    except Exception as error:  # the library's own validation errors have no common base
        raise _refused(model_class, error) from error


def _numbers(config: Any) -> dict[str, Any]:
    """What a configuration's own class declares, without what all configurations have."""
    found = {}
    for name in inspect.get_annotations(type(config)):
        if not name.startswith("_"):
            value = getattr(config, name)
            found[name] = _numbers(value) if hasattr(value, "to_dict") else value
    return found


def _refused(name: str, error: Exception) -> CheckpointError:
    said = " ".join(str(error).split())[:200]
    return CheckpointError(
        f"the installed transformers cannot build this {name} ({said}); install the version of the "
        "library that the checkpoint's config names"
    )
