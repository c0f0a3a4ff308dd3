"""Configuration and weights of open_clip's families, from a name and a choice of weights.

Each of these families calls :func:`open_source`, builds the model of ``source.config``, and calls
:func:`fill`. Models of timm (``timm_source``) are presented to them as folders in the format of
open_clip. Families of other libraries have sources of their own, and share ``state_file`` and
``fitting``.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ovsprune.backbones.fitting import Parts, fit, split, text_names
from ovsprune.backbones.hub import repository_of
from ovsprune.backbones.open_clip_folder import (
    Folder,
    embedded,
    hub_folder,
    is_folder,
    open_folder,
)
from ovsprune.backbones.open_clip_model import has_own_text
from ovsprune.backbones.pretrained import default_tag, resolve
from ovsprune.backbones.state_file import StateFile, open_state
from ovsprune.backbones.timm_source import is_timm, timm_folder
from ovsprune.core.errors import OptionError

__all__ = [
    "OWN_WEIGHTS",
    "TINY",
    "Source",
    "config_of",
    "describes_itself",
    "fill",
    "open_source",
    "other_tensors",
]

TINY = "tiny"
OWN_WEIGHTS = ("embedded", "local", "hub")
"""Values of ``Backbone.pretrained`` for weights that were named together with the model."""
_GELUS = ("gelu", "quick_gelu")


@dataclass(eq=False)
class Source:
    """Requested model, before it is built.

    Attributes:
        name: Name of the model.
        pretrained: Choice of weights: a tag, a file name, one of :data:`OWN_WEIGHTS`, or None.
        config: open_clip's model configuration, with the activation in ``quick_gelu``.
        preprocess: Preprocessing configuration of the weights; may be empty.
        weights: The weights, or None for random ones.
        notes: Remarks for the user.
    """

    name: str
    pretrained: str | None
    config: dict[str, Any]
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    weights: StateFile | None = None
    notes: tuple[str, ...] = ()


def config_of(name: str) -> dict[str, Any]:
    """Return the model configuration of ``tiny``, of a folder, or of a name of open_clip."""
    folder = _folder(name, None, weights=False)
    if folder is not None:
        return deepcopy(dict(folder.model))
    import open_clip

    config = open_clip.get_model_config(name)
    assert config is not None
    return deepcopy(config)


def describes_itself(name: str) -> bool:
    """Return True if ``name`` leads to a configuration that open_clip's list need not contain."""
    return is_folder(Path(name)) or repository_of(name) is not None or is_timm(name)


def _folder(name: str, tag: str | None, *, weights: bool) -> Folder | None:
    """Return the folder that ``name`` denotes, if any; ``tag`` selects among timm's weights."""
    repository = repository_of(name)
    if name == TINY:
        return embedded(TINY)
    if repository is not None:
        return hub_folder(repository, weights=weights)
    if is_timm(name):
        return timm_folder(name, tag, weights=weights)
    if is_folder(Path(name)):
        return open_folder(Path(name))
    return None


def open_source(name: str, pretrained: str | None, activation: str | None) -> Source:
    """Find a model, and read its weights.

    The activation is that of the tag (OpenAI's tags are QuickGELU, also under the plain name, for
    which open_clip builds GELU and only warns) or of the folder. For a file it is that of the name
    (``-quickgelu``) or ``activation``.

    Args:
        name: ``tiny``, a name of open_clip, a folder, ``hf-hub:org/repo``, or ``timm:NAME``.
        pretrained: A tag, a file, ``hf-hub:org/repo``, ``"none"``, or None for the default.
        activation: ``"gelu"`` or ``"quick_gelu"``, if the weights do not tell, or None.

    Raises:
        WeightsError: The weights are not available.
        OptionError: ``activation`` is unknown, or contradicts that of the weights.
    """
    if activation is not None and activation not in _GELUS:
        raise OptionError(f"--activation {activation!r} is unknown; known: {', '.join(_GELUS)}")
    source = Source(name=_short_name(name), pretrained=None, config={})
    file = Path(pretrained) if pretrained is not None and Path(pretrained).is_file() else None
    tag = pretrained if file is None and pretrained != "none" else None
    uses_own = pretrained is None or (tag is not None and is_timm(name))
    folder = _folder(name, tag, weights=uses_own)
    source.config = config_of(name) if folder is None else deepcopy(dict(folder.model))
    source.preprocess = {} if folder is None else folder.preprocess
    quick = bool(source.config.get("quick_gelu", False))
    is_known = False  # True if the weights tell their activation
    if folder is not None and uses_own:
        source.pretrained, is_known = folder.label, True
        source.weights = _open_weights(folder.weights, folder)
    elif file is not None:
        source.pretrained, source.weights = file.name, _open_weights(file, folder)
    elif pretrained != "none":
        source.pretrained = pretrained or default_tag(name)
        path, source.preprocess = resolve(name, source.pretrained)
        quick, is_known = bool(source.preprocess.get("quick_gelu", False)), True
        source.weights = open_state(path)
    if is_known:
        _check_activation(source, quick, activation)
    elif activation is not None:
        quick = activation == "quick_gelu"
    source.config["quick_gelu"] = quick
    looks_openai = source.weights is not None and source.weights.openai
    if looks_openai and not (is_known or activation or quick):
        source.notes += (
            f"{source.pretrained} looks like a release of OpenAI's, which are trained with "
            f"QuickGELU; {name} means GELU for a file: give --activation quick_gelu",
        )
    return source


def _open_weights(path: Path, folder: Folder | None) -> StateFile:
    state = open_state(path)
    return state if folder is None else replace(state, tensors=folder.renamed(state.tensors))


def _short_name(name: str) -> str:
    if is_timm(name):
        return name.partition(".")[0]
    return Path(name).resolve().name if is_folder(Path(name)) else name


def _check_activation(source: Source, quick: bool, activation: str | None) -> None:
    trained_with = "quick_gelu" if quick else "gelu"
    if activation not in (None, trained_with):
        raise OptionError(
            f"the weights {source.pretrained!r} of {source.name} were trained with {trained_with}, "
            f"not {activation}; leave --activation out"
        )


def fill(source: Source, model: nn.Module) -> dict[str, Tensor]:
    """Load the weights of ``source`` into ``model``, completely or not at all.

    The function appends notes to ``source``.

    Returns:
        Tensors outside the image tower, by canonical name: those of the model; empty if the weights
        contain the image tower only; those of the file if the text tower is one from a hub, which
        is not built.

    Raises:
        WeightsError: Keys are missing, unexpected or of another shape.
    """
    text: Mapping[str, Tensor] = {}
    has_text = has_own_text(source.config)
    if source.weights is not None:
        path, state = source.weights.path, source.weights.tensors
        parts = split(path, state, model.get_submodule("visual"))
        text = _complete_text(source, path.name, parts, model) if has_text else parts.text
        tower = {f"visual.{name}": value for name, value in parts.tower.items()}
        others = text if has_text and text else other_tensors(model)
        fit(source.name, path, {**tower, **others}, model, state)
        if parts.others:
            source.notes += (
                f"{path.name}: the image tower lies under {parts.prefix!r}; tensors outside of the "
                f"model are ignored ({parts.others})",
            )
    if has_text:
        return other_tensors(model) if text or source.weights is None else {}
    if source.config["text_cfg"] is None:
        return {}
    source.notes += (
        f"the text tower of {source.name} ({source.config['text_cfg']['hf_model_name']}) lives "
        "on a hub and is not built here: text embeddings come from a file "
        "(--text-embeddings FILE.npz)",
    )
    return dict(text)


def other_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a CLIP outside the image tower, by name."""
    return {k: v for k, v in model.state_dict().items() if not k.startswith("visual.")}


def _complete_text(
    source: Source, file: str, parts: Parts, model: nn.Module
) -> Mapping[str, Tensor]:
    """Return the text tower of a file by the model's names; empty if it is incomplete."""
    expected = other_tensors(model).keys()
    text = text_names(parts.text, expected)
    if all(value.numel() == 1 for value in text.values()):  # only a temperature
        return {}
    if parts.root and not expected <= text.keys():
        source.notes += (
            f"{file} has no complete text tower under {parts.root!r}: only the image tower is "
            "loaded",
        )
        return {}
    # Below a framework's prefix, tensors that are not CLIP's are normal; else they are errors.
    return {k: v for k, v in text.items() if k in expected} if parts.root else text
