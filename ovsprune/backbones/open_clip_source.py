"""What a name and a choice of weights mean for open_clip's families: configuration and state.

The way of every such family: :func:`open_source`, build the model of ``source.config``, then
:func:`fill` it. Models of timm's (``timm_source``) are given to open_clip's families as folders of
its form. Towers of other libraries (transformers' folders) have families with sources of their own;
what they share with this one lies in ``state_file`` and ``fitting``.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
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

__all__ = ["OWN_WEIGHTS", "TINY", "Source", "config_of", "describes_itself", "fill", "open_source"]

TINY = "tiny"
OWN_WEIGHTS = ("embedded", "local", "hub")
"""What ``pretrained`` says of a model that is named together with its weights."""
_GELUS = ("gelu", "quick_gelu")


@dataclass(eq=False)
class Source:
    """A model that was asked for, before it is built.

    Attributes:
        name: What it is called from now on.
        pretrained: Which weights: a tag, a file's name, one of :data:`OWN_WEIGHTS`, or None.
        config: open_clip's model configuration, with the activation in ``quick_gelu``.
        preprocess: What the weights' own configuration says of pictures; may be empty.
        weights: The weights, or None for random ones.
        notes: What a user should know.
    """

    name: str
    pretrained: str | None
    config: dict[str, Any]
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    weights: StateFile | None = None
    notes: tuple[str, ...] = ()


def config_of(name: str) -> dict[str, Any]:
    """The model configuration of ``tiny``, of a folder, or of one of open_clip's names."""
    with ExitStack() as stack:
        folder = _folder(name, None, False, stack)
        if folder is not None:
            return deepcopy(dict(folder.model))
    import open_clip

    config = open_clip.get_model_config(name)
    assert config is not None
    return deepcopy(config)


def describes_itself(name: str) -> bool:
    """Whether ``name`` brings a configuration that open_clip's list of names need not have."""
    return is_folder(Path(name)) or repository_of(name) is not None or is_timm(name)


def _folder(name: str, tag: str | None, weights: bool, stack: ExitStack) -> Folder | None:
    """The folder that ``name`` stands for, if any; ``tag`` chooses among weights of timm's."""
    repository = repository_of(name)
    if name == TINY:
        return stack.enter_context(embedded(TINY))
    if repository is not None:
        return hub_folder(repository, weights=weights)
    if is_timm(name):
        return timm_folder(name, tag, weights=weights)
    if is_folder(Path(name)):
        return open_folder(Path(name))
    return None


def open_source(name: str, pretrained: str | None, activation: str | None) -> Source:
    """Find what was asked for, and read its weights.

    The activation is the tag's own (OpenAI's tags are QuickGELU, also under the plain name, for
    which open_clip builds GELU and only warns) or the folder's; for a bare file the name's
    (``-quickgelu``), or what ``activation`` says.

    Args:
        name: ``tiny``, a name of open_clip's, a folder, ``hf-hub:org/repo``, or ``timm:NAME``.
        pretrained: A tag, a file, ``hf-hub:org/repo``, ``"none"``, or None for the default.
        activation: ``"gelu"`` or ``"quick_gelu"``, where the weights do not tell, or None.

    Raises:
        WeightsError: The weights cannot be had.
        OptionError: ``activation`` is unknown, or contradicts what the weights were trained with.
    """
    if activation is not None and activation not in _GELUS:
        raise OptionError(f"--activation {activation!r} is unknown; known: {', '.join(_GELUS)}")
    source = Source(_called(name), None, {})
    file = Path(pretrained) if pretrained is not None and Path(pretrained).is_file() else None
    tag = pretrained if file is None and pretrained != "none" else None
    with ExitStack() as stack:
        own = pretrained is None or (tag is not None and is_timm(name))
        folder = _folder(name, tag, own, stack)
        source.config = config_of(name) if folder is None else deepcopy(dict(folder.model))
        source.preprocess = {} if folder is None else folder.preprocess
        quick = bool(source.config.get("quick_gelu", False))
        fixed = False
        if folder is not None and own:
            source.pretrained, fixed = folder.label, True
            source.weights = _opened(folder.weights, folder)
        elif file is not None:
            source.pretrained, source.weights = file.name, _opened(file, folder)
        elif pretrained != "none":
            source.pretrained = pretrained or default_tag(name)
            path, source.preprocess = resolve(name, source.pretrained)
            quick, fixed = bool(source.preprocess.get("quick_gelu", False)), True
            source.weights = open_state(path)
    if fixed:
        _check_activation(source, quick, activation)
    elif activation is not None:
        quick = activation == "quick_gelu"
    source.config["quick_gelu"] = quick
    if source.weights is not None and source.weights.openai and not (fixed or activation or quick):
        source.notes += (
            f"{source.pretrained} looks like a release of OpenAI's, which are trained with "
            f"QuickGELU; {name} means GELU for a file: give --activation quick_gelu",
        )
    return source


def _opened(path: Path, folder: Folder | None) -> StateFile:
    state = open_state(path)
    return state if folder is None else replace(state, tensors=folder.renamed(state.tensors))


def _called(name: str) -> str:
    if is_timm(name):
        return name.partition(".")[0]
    return Path(name).resolve().name if is_folder(Path(name)) else name


def _check_activation(source: Source, quick: bool, activation: str | None) -> None:
    own = "quick_gelu" if quick else "gelu"
    if activation is not None and activation != own:
        raise OptionError(
            f"the weights {source.pretrained!r} of {source.name} were trained with {own}, not "
            f"{activation}; leave --activation out"
        )


def fill(source: Source, model: nn.Module) -> dict[str, Tensor]:
    """Load the weights of ``source`` into ``model``, all of them or nothing.

    Args:
        source: Notes are added to it.
        model: What :func:`~ovsprune.backbones.open_clip_model.build_clip` made of its config.

    Returns:
        State of everything but the image tower, by canonical name: the model's own; empty if the
        weights are of the image tower alone; passed through where the model has no text tower,
        because that lives on a hub.

    Raises:
        WeightsError: Keys are missing, unexpected or of other shapes.
    """
    passed: Mapping[str, Tensor] = {}
    if source.weights is not None:
        path, state = source.weights.path, source.weights.tensors
        parts = split(path, state, model.get_submodule("visual"))
        passed = parts.text
        if has_own_text(source.config):
            passed = _whole_text(source, path.name, parts, model)
        tower = {f"visual.{name}": value for name, value in parts.tower.items()}
        own = passed if has_own_text(source.config) and passed else _beside_tower(model)
        fit(source.name, path, {**tower, **own}, model, state)
        if parts.others:
            source.notes += (
                f"{path.name}: the image tower lies under {parts.prefix!r}; tensors of other "
                f"things are left out ({parts.others})",
            )
    if not has_own_text(source.config):
        if source.config["text_cfg"] is None:
            return {}
        source.notes += (
            f"the text tower of {source.name} ({source.config['text_cfg']['hf_model_name']}) lives "
            "on a hub and is not built here: text embeddings come from a file "
            "(--text-embeddings FILE.npz)",
        )
        return dict(passed)
    return _beside_tower(model) if passed or source.weights is None else {}


def _beside_tower(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if not k.startswith("visual.")}


def _whole_text(source: Source, file: str, parts: Parts, model: nn.Module) -> Mapping[str, Tensor]:
    """The text tower of a file by the model's names; empty if the file has none worth the name."""
    wanted = _beside_tower(model).keys()
    text = text_names(parts.text, wanted)
    if all(value.numel() == 1 for value in text.values()):  # a temperature is no text tower
        return {}
    if parts.root and not wanted <= text.keys():
        source.notes += (
            f"{file} has no whole text tower under {parts.root!r}: the image tower alone is loaded",
        )
        return {}
    return {k: v for k, v in text.items() if k in wanted} if parts.root else text
