"""A folder in the form that open_clip reads by ``local-dir:``: configuration and weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from ovsprune.backbones.pretrained import read_state
from ovsprune.core.errors import WeightsError

__all__ = ["CONFIG", "Folder", "embedded", "is_folder", "open_folder"]

CONFIG = "open_clip_config.json"
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True, eq=False)
class Folder:
    """What such a folder holds.

    Attributes:
        path: The folder.
        model: open_clip's model configuration.
        preprocess: Its preprocessing configuration; may be empty.
    """

    path: Path
    model: Mapping[str, Any]
    preprocess: Mapping[str, Any]

    @property
    def weights(self) -> Path:
        """The weights' file.

        Raises:
            WeightsError: There is none.
        """
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


@contextmanager
def embedded(name: str) -> Iterator[Folder]:
    """The folder of a model that comes with the package.

    Raises:
        WeightsError: It is missing from this installation.
    """
    with resources.as_file(resources.files("ovsprune") / "assets" / name) as path:
        if not is_folder(path):
            raise WeightsError(f"the embedded model is missing from this installation ({path})")
        yield open_folder(path)
