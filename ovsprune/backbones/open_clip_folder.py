"""Folders in the format of open_clip (``local-dir:``): a configuration and weights.

Repositories that open_clip reads with ``hf-hub:`` have the same format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ovsprune.backbones.hub import PREFIX, hub_file
from ovsprune.core.errors import WeightsError

__all__ = ["CONFIG", "Folder", "embedded", "hub_folder", "is_folder", "open_folder"]

CONFIG = "open_clip_config.json"
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True, eq=False)
class Folder:
    """Model in the format of open_clip.

    Attributes:
        path: The folder.
        model: open_clip's model configuration.
        preprocess: Its preprocessing configuration; may be empty.
        file: File of the weights, if it is not in the folder.
        label: Value of ``Backbone.pretrained`` for its own weights.
        renamed: Maps the tensors of a file to the names of open_clip's model.
    """

    path: Path
    model: Mapping[str, Any]
    preprocess: Mapping[str, Any]
    file: Path | None = None
    label: str = "local"
    renamed: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict

    @property
    def weights(self) -> Path:
        """File of the weights.

        Raises:
            WeightsError: There is none.
        """
        if self.file is not None:
            return self.file
        for name in _WEIGHTS:
            if (self.path / name).is_file():
                return self.path / name
        raise WeightsError(f"{self.path} has a configuration but no weights: {_WEIGHTS[0]}")


def is_folder(path: Path) -> bool:
    """Return True if ``path`` is a folder in the format of open_clip."""
    return (path / CONFIG).is_file()


def open_folder(path: Path) -> Folder:
    """Read the configuration of a folder.

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
    return Folder(path=path, model=model, preprocess=config.get("preprocess_cfg") or {})


def hub_folder(repository: str, *, weights: bool = True) -> Folder:
    """Read ``org/repo`` on the hub, preferably from the local cache; the weights are optional.

    Raises:
        WeightsError: The files are not available, or not in the format of open_clip.
    """
    subject = f"the configuration and weights of {PREFIX}{repository}"
    config = hub_file(repository, [CONFIG], subject)
    file = None
    if weights:
        file = hub_file(repository, _WEIGHTS, f"the weights of {PREFIX}{repository}")
    # The cache may hold the weights in another snapshot folder than the configuration.
    return replace(open_folder(config.parent), file=file, label="hub")


def embedded(name: str) -> Folder:
    """Open the folder of a model that is part of the package.

    Raises:
        WeightsError: It is missing from this installation.
    """
    path = Path(__file__).parents[1] / "assets" / name
    if not is_folder(path):
        raise WeightsError(f"the embedded model is missing from this installation ({path})")
    return replace(open_folder(path), label="embedded")
