"""Where models of transformers come from: a folder, or a repository on the hub and its cache.

Read are JSON and safetensors; no code that a repository holds is loaded, and nothing is unpickled.
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

from ovsprune.backbones.hub import cached, hub_file, knock
from ovsprune.backbones.state_file import read_state
from ovsprune.core.errors import WeightsError
from ovsprune.core.records import Preprocess

__all__ = ["PREFIX", "Source", "cached_folder", "is_transformers", "open_source", "short_name"]

PREFIX = "hf:"
"""What a model's name starts with that is one of transformers'."""

_CONFIG = "config.json"
_PICTURES = "preprocessor_config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "vocab.json", "merges.txt", "spiece.model")
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
_WAYS_OUT = (
    "a local folder with config.json and model.safetensors (--model hf:FOLDER), a cache copied "
    "from another machine (HF_HOME), or a folder with config.json alone and --pretrained none, "
    "which takes random weights and marks the result as untrained"
)

# Classes by the model_type of a configuration; of several, `architectures` says which.
_CLASSES = {
    "clip": ("CLIPModel",),
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
    "siglip": ("SiglipModel",),
    "siglip_vision_model": ("SiglipVisionModel",),
    "siglip2": ("Siglip2Model",),
    "siglip2_vision_model": ("Siglip2VisionModel",),
    "dinov2": ("Dinov2Model",),
}

# What their image processors do if no file says otherwise, by the first letters of the model_type.
_HALF = (0.5, 0.5, 0.5)
_DEFAULTS: dict[str, Callable[[tuple[int, int]], Preprocess]] = {
    "clip": Preprocess,
    "siglip2": lambda size: Preprocess(size, _HALF, _HALF, "bilinear", "squash"),
    "siglip": lambda size: Preprocess(size, _HALF, _HALF, "bicubic", "squash"),
    "dinov2": lambda size: Preprocess(size, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # numbers of PIL


@dataclass(eq=False)
class Source:
    """A model of transformers that was asked for, before it is built.

    Attributes:
        name: What it is called from now on: a folder's last part, or ``hf:ORG/REPOSITORY``.
        label: What ``pretrained`` says of its own weights: ``"local"`` or ``"hub"``.
        folder: Where its configuration lies; in the cache, of a repository.
        repository: ``ORG/REPOSITORY``, or None for a folder.
        config: What ``config.json`` says.
        model_class: Class of the model.
    """

    name: str
    label: str
    folder: Path
    repository: str | None
    config: Mapping[str, Any]
    model_class: str

    def state(self) -> dict[str, Tensor]:
        """Its own weights, in one file or in several.

        Raises:
            WeightsError: They cannot be had, are damaged, or are not in safetensors.
        """
        first = self._file(_WEIGHTS)
        if first.suffix != ".json":
            return read_state(first)
        shards = _read_json(first).get("weight_map")
        names = sorted(set(shards.values())) if isinstance(shards, Mapping) else []
        if not names or any(not isinstance(n, str) or Path(n).name != n for n in names):
            raise WeightsError(f"{first} lists no files of weights beside it; copy it again")
        state: dict[str, Tensor] = {}
        for name in names:
            state |= read_state(self._file((name,)))
        return state

    def preprocess(self, size: tuple[int, int]) -> Preprocess:
        """How pictures become the input of a tower whose native size in pixels is ``size``.

        Raises:
            WeightsError: What the files say of it is no such thing.
        """
        kind = next(k for k in _DEFAULTS if str(self.config["model_type"]).startswith(k))
        usual = _DEFAULTS[kind](size)
        file = self._optional(_PICTURES)
        said = {} if file is None else _read_json(file)
        try:
            mean = _three(said.get("image_mean") or usual.mean)
            std = _three(said.get("image_std") or usual.std)
            method = said.get("resample")
            interpolation = usual.interpolation if method is None else _INTERPOLATIONS[method]
            mode = usual.resize_mode
            edges = said.get("size")
            if edges is not None:
                shortest = isinstance(edges, int) or "shortest_edge" in edges
                mode = "shortest" if shortest else "squash"
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(
                f"{file} does not say how pictures become input ({error!r}): image_mean and "
                "image_std have three numbers, resample is 2 (bilinear) or 3 (bicubic)"
            ) from error
        return Preprocess(size, mean, std, interpolation, mode)

    def fetch_tokenizer(self) -> None:
        """Get the files of its tokenizer into :attr:`folder`, as far as they can be had."""
        for name in _TOKENIZER:
            self._optional(name)

    @cached_property
    def online(self) -> bool:
        """Whether the hub answers; asked once."""
        from huggingface_hub import constants

        try:
            knock(constants.ENDPOINT, f"the files of {self.name}")
        except WeightsError:
            return False
        return True

    def _file(self, names: Sequence[str]) -> Path:
        if self.repository is not None:
            return hub_file(self.repository, names, f"the files of {self.name}", _WAYS_OUT)
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
        found = cached(self.repository, [name])
        if found is None and self.online:
            with suppress(WeightsError):
                found = hub_file(self.repository, [name], name)
        return found


def is_transformers(name: str) -> bool:
    """Whether ``name`` means a model of transformers: by its prefix, or a folder of that form."""
    if name.startswith(PREFIX):
        return True
    file = Path(name) / _CONFIG
    if not file.is_file():
        return False
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    # our own checkpoints have a config.json, too, and say what it is
    return isinstance(config, dict) and "model_type" in config and "format" not in config


def short_name(name: str) -> str:
    """Last part of the folder or repository that ``name`` means."""
    rest = name.removeprefix(PREFIX)
    return Path(rest).resolve().name if Path(rest).is_dir() else rest.rpartition("/")[2]


def cached_folder(name: str) -> Path | None:
    """Where the local cache has the repository that ``name`` means; None for a folder's name."""
    if not name.startswith(PREFIX):
        return None
    found = cached(name.removeprefix(PREFIX), [_CONFIG])
    return None if found is None else found.parent


def open_source(name: str) -> Source:
    """What ``name`` means: ``hf:FOLDER``, ``hf:ORG/REPOSITORY``, or a folder.

    Raises:
        WeightsError: There is no such thing, or it holds another kind of model.
    """
    rest = name.removeprefix(PREFIX)
    repository = None
    folder = Path(rest)
    called, label = folder.resolve().name, "local"
    if not folder.is_dir():
        if _REPOSITORY.fullmatch(rest) is None:
            raise WeightsError(
                f"{name!r} is neither a folder nor the name of a repository; write "
                f"{PREFIX}FOLDER or {PREFIX}ORG/REPOSITORY"
            )
        repository, called, label = rest, f"{PREFIX}{rest}", "hub"
        folder = hub_file(rest, [_CONFIG], f"the files of {called}", _WAYS_OUT).parent
    elif not (folder / _CONFIG).is_file():
        raise WeightsError(f"{folder} has no {_CONFIG}, so it is no folder of transformers'")
    config = _read_json(folder / _CONFIG)
    return Source(called, label, folder, repository, config, _class_of(called, config))


def _class_of(name: str, config: Mapping[str, Any]) -> str:
    classes = _CLASSES.get(str(config.get("model_type")))
    if classes is None:
        raise WeightsError(
            f"{name} holds a model of the type {config.get('model_type')!r}; those that can be "
            f"pruned are {', '.join(_CLASSES)}"
        )
    said = config.get("architectures")
    named = [c for c in said if c in classes] if isinstance(said, list) else []
    return (named or classes)[0]


def _three(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file} cannot be read ({error}); copy it again") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{file} holds {type(found).__name__}, expected an object")
    return found
