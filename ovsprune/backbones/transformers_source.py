"""Models of transformers from a folder, or from a repository on the hub and its cache.

Only JSON and safetensors files are read. No code of a repository is loaded, and nothing is
unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from ovsprune.backbones.hub import cached, check_reachable, hub_file
from ovsprune.backbones.state_file import read_state
from ovsprune.core.errors import WeightsError
from ovsprune.core.records import Preprocess

__all__ = ["PREFIX", "Source", "cached_folder", "is_transformers", "open_source", "short_name"]

PREFIX = "hf:"
"""Prefix of the name of a model of transformers."""

_CONFIG = "config.json"
_PREPROCESSOR = "preprocessor_config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "spiece.model")
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
_REMEDY = (
    "a local folder with config.json and model.safetensors (--model hf:FOLDER), a cache copied "
    "from another machine (HF_HOME), or a folder with config.json alone and --pretrained none, "
    "which takes random weights and marks the result as untrained"
)

# Classes by the model_type of a configuration; `architectures` selects one of several.
_CLASSES = {
    "clip": ("CLIPModel",),
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
    "siglip": ("SiglipModel",),
    "siglip_vision_model": ("SiglipVisionModel",),
    "siglip2": ("Siglip2Model",),
    "siglip2_vision_model": ("Siglip2VisionModel",),
    "dinov2": ("Dinov2Model",),
}

# Defaults of their image processors, by the first letters of the model_type.
_HALF = (0.5, 0.5, 0.5)
_DEFAULTS: dict[str, Callable[[tuple[int, int]], Preprocess]] = {
    "clip": Preprocess,
    "siglip2": lambda size: Preprocess(
        size=size, mean=_HALF, std=_HALF, interpolation="bilinear", resize_mode="squash"
    ),
    "siglip": lambda size: Preprocess(
        size=size, mean=_HALF, std=_HALF, interpolation="bicubic", resize_mode="squash"
    ),
    "dinov2": lambda size: Preprocess(
        size=size, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    ),
}
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # numbers of PIL


@dataclass(eq=False)
class Source:
    """Requested model of transformers, before it is built.

    Attributes:
        name: Name of the model: the last part of a folder, or ``hf:ORG/REPOSITORY``.
        folder: Folder of its configuration; in the cache for a repository.
        repository: ``ORG/REPOSITORY``, or None for a folder.
        config: Content of ``config.json``.
        model_class: Name of the model's class.
    """

    name: str
    folder: Path
    repository: str | None
    config: Mapping[str, Any]
    model_class: str

    def state(self) -> dict[str, Tensor]:
        """Read its own weights, from one file or several.

        Raises:
            WeightsError: They are missing, damaged, or not in safetensors.
        """
        first = self._file(_WEIGHTS)
        if first.suffix != ".json":
            return read_state(first)
        shards = _read_json(first).get("weight_map")
        names = sorted(set(shards.values())) if isinstance(shards, Mapping) else []
        # A name with a folder could lead out of the model's folder.
        if not names or any(not isinstance(n, str) or Path(n).name != n for n in names):
            raise WeightsError(f"{first} lists no files of weights in its folder; copy it again")
        state: dict[str, Tensor] = {}
        for name in names:
            state |= read_state(self._file((name,)))
        return state

    def preprocess(self, size: tuple[int, int]) -> Preprocess:
        """Return the preprocessing of images for a tower of native size ``size``, in pixels.

        Raises:
            WeightsError: The configuration of the preprocessing is malformed.
        """
        kind = next(k for k in _DEFAULTS if str(self.config["model_type"]).startswith(k))
        defaults = _DEFAULTS[kind](size)
        file = self._optional(_PREPROCESSOR)
        settings = {} if file is None else _read_json(file)
        try:
            mean = _three(settings.get("image_mean") or defaults.mean)
            std = _three(settings.get("image_std") or defaults.std)
            method = settings.get("resample")
            interpolation = defaults.interpolation if method is None else _INTERPOLATIONS[method]
            mode = defaults.resize_mode
            edges = settings.get("size")
            if edges is not None:
                shortest = isinstance(edges, int) or "shortest_edge" in edges
                mode = "shortest" if shortest else "squash"
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(
                f"{file} is no configuration of the preprocessing ({error!r}): image_mean and "
                "image_std have three numbers, resample is 2 (bilinear) or 3 (bicubic)"
            ) from error
        return Preprocess(
            size=size, mean=mean, std=std, interpolation=interpolation, resize_mode=mode
        )

    def fetch_tokenizer(self) -> None:
        """Download the files of its tokenizer to :attr:`folder`, if they are available."""
        for name in _TOKENIZER:
            self._optional(name)

    @cached_property
    def online(self) -> bool:
        """True if the hub can be reached; tested once."""
        from huggingface_hub import constants

        try:
            check_reachable(constants.ENDPOINT, f"the files of {self.name}")
        except WeightsError:
            return False
        return True

    def _file(self, names: Sequence[str]) -> Path:
        if self.repository is not None:
            return hub_file(self.repository, names, f"the files of {self.name}", _REMEDY)
        for name in names:
            if (self.folder / name).is_file():
                return self.folder / name
        raise WeightsError(
            f"{self.folder} has a configuration but no {names[0]}. Save the model there with "
            "save_pretrained (pickled weights are not opened), give a file (--pretrained PATH), or "
            "--pretrained none, which takes random weights and marks the result as untrained"
        )

    def _optional(self, name: str) -> Path | None:
        if self.repository is None:
            return self.folder / name if (self.folder / name).is_file() else None
        path = cached(self.repository, [name])
        if path is None and self.online:
            with suppress(WeightsError):
                path = hub_file(self.repository, [name], name)
        return path


def is_transformers(name: str) -> bool:
    """Return True for a name with the prefix, and for a folder in the format of transformers."""
    if name.startswith(PREFIX):
        return True
    file = Path(name) / _CONFIG
    if not file.is_file():
        return False
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    # The config.json of a slim checkpoint has the entry "format".
    return isinstance(config, dict) and "model_type" in config and "format" not in config


def short_name(name: str) -> str:
    """Return the last part of the folder or repository ``name``."""
    rest = name.removeprefix(PREFIX)
    return Path(rest).resolve().name if Path(rest).is_dir() else rest.rpartition("/")[2]


def cached_folder(name: str) -> Path | None:
    """Return the folder of a repository in the local cache; None if ``name`` is a folder."""
    if not name.startswith(PREFIX):
        return None
    path = cached(name.removeprefix(PREFIX), [_CONFIG])
    return None if path is None else path.parent


def open_source(name: str) -> Source:
    """Find the model ``hf:FOLDER``, ``hf:ORG/REPOSITORY``, or a folder.

    Raises:
        WeightsError: The model does not exist, or is of an unsupported type.
    """
    rest = name.removeprefix(PREFIX)
    repository = None
    folder = Path(rest)
    short = folder.resolve().name
    if not folder.is_dir():
        if _REPOSITORY.fullmatch(rest) is None:
            raise WeightsError(
                f"{name!r} is neither a folder nor the name of a repository; write "
                f"{PREFIX}FOLDER or {PREFIX}ORG/REPOSITORY"
            )
        repository, short = rest, f"{PREFIX}{rest}"
        folder = hub_file(rest, [_CONFIG], f"the files of {short}", _REMEDY).parent
    elif not (folder / _CONFIG).is_file():
        raise WeightsError(f"{folder} has no {_CONFIG}, so it is not a folder of transformers")
    config = _read_json(folder / _CONFIG)
    return Source(
        name=short,
        folder=folder,
        repository=repository,
        config=config,
        model_class=_class_of(short, config),
    )


def _class_of(name: str, config: Mapping[str, Any]) -> str:
    classes = _CLASSES.get(str(config.get("model_type")))
    if classes is None:
        raise WeightsError(
            f"{name} holds a model of the type {config.get('model_type')!r}; those that can be "
            f"pruned are {', '.join(_CLASSES)}"
        )
    listed = config.get("architectures")
    known = [c for c in listed if c in classes] if isinstance(listed, list) else []
    # Without a known entry in architectures, the first class of the type is taken.
    return (known or classes)[0]


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file} cannot be read ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{file} holds {type(content).__name__}, expected an object")
    return content
