"""A folder in the form that open_clip reads by ``local-dir:``: configuration and weights.

The repositories that it reads by ``hf-hub:`` have the same form.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from ovsprune.backbones.hub import PREFIX, hub_file
from ovsprune.backbones.state_file import read_state
from ovsprune.core.errors import WeightsError

__all__ = ["CONFIG", "Folder", "embedded", "hub_folder", "is_folder", "open_folder"]

CONFIG = "open_clip_config.json"
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True, eq=False)
class Folder:
    """What such a folder holds.

    Attributes:
        path: The folder.
        model: open_clip's model configuration.
        preprocess: Its preprocessing configuration; may be empty.
        file: The weights' file, where it is not in the folder.
        label: What its own weights are called.
        renamed: What turns the names of a file of weights into those of open_clip's model.
    """

    path: Path
    model: Mapping[str, Any]
    preprocess: Mapping[str, Any]
    file: Path | None = None
    label: str = "local"
    renamed: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict

    @property
    def weights(self) -> Path:
        """The weights' file.

        Raises:
            WeightsError: There is none.
        """
        if self.file is not None:
            return self.file
        for name in _WEIGHTS:
            if (self.path / name).is_file():
                return self.path / name
        raise WeightsError(f"{self.path} has a configuration but no weights: {_WEIGHTS[0]}")

    def state(self) -> dict[str, Tensor]:
        """The weights in float32."""
        return {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in read_state(self.weights).items()
        }


def is_folder(path: Path) -> bool:
    """Whether ``path`` is such a folder."""
    return (path / CONFIG).is_file()


def open_folder(path: Path) -> Folder:
    """Read a folder's configuration.

    Raises:
        WeightsError: The configuration cannot be read.
    """
    try:
        config = json.loads((path / CONFIG).read_text("utf-8"))
        model = config["model_cfg"]
        if not {"embed_dim", "vision_cfg", "text_cfg"} <= set(model):
            raise KeyError("embed_dim, vision_cfg, text_cfg")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{path / CONFIG} is no configuration of open_clip's ({error!r}): it needs model_cfg "
            "with embed_dim, vision_cfg and text_cfg"
        ) from error
    return Folder(path, model, config.get("preprocess_cfg") or {})


def hub_folder(repository: str, *, weights: bool = True) -> Folder:
    """What a repository on the hub holds, from the local cache where it is there.

    Args:
        repository: ``org/repo``.
        weights: Whether the weights are wanted, too.

    Raises:
        WeightsError: It is neither in the cache nor to be had, or not in open_clip's form.
    """
    config = hub_file(
        repository, [CONFIG], f"the configuration and weights of {PREFIX}{repository}"
    )
    file = None
    if weights:
        file = hub_file(repository, _WEIGHTS, f"the weights of {PREFIX}{repository}")
    return replace(open_folder(config.parent), file=file, label="hub")


@contextmanager
def embedded(name: str) -> Iterator[Folder]:
    """The folder of a model that comes with the package.

    Raises:
        WeightsError: It is missing from this installation.
    """
    with resources.as_file(resources.files("ovsprune") / "assets" / name) as path:
        if not is_folder(path):
            raise WeightsError(f"the embedded model is missing from this installation ({path})")
        yield replace(open_folder(path), label="embedded")
