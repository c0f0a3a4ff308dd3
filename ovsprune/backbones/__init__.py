"""Backbone families: load towers, prepare them for pruning, rebuild them. One family per file."""

from __future__ import annotations

from pathlib import Path

from ovsprune.backbones.registry import FAMILIES
from ovsprune.core.errors import OptionError, UnknownNameError, WeightsError
from ovsprune.core.protocols import Backbone, Family

__all__ = ["FAMILIES", "load_backbone", "model_names"]


def model_names() -> tuple[str, ...]:
    """Return the names that :func:`load_backbone` accepts, besides directories and prefixes."""
    return tuple(sorted({name for family in FAMILIES for name in FAMILIES.get(family).names()}))


def load_backbone(
    name: str,
    *,
    pretrained: str | None = None,
    activation: str | None = None,
    device: str = "cpu",
) -> Backbone:
    """Load a model: image tower, preprocessing and, if it has one, text tower.

    Args:
        name: ``"tiny"``; a name of open_clip (``"ViT-B-16"``, ``"ViT-B/16"``); the directory of a
            slim checkpoint or of an unstructured result; a folder that open_clip reads with
            ``local-dir:`` (``open_clip_config.json`` and weights, at least of the image tower);
            ``"hf-hub:ORG/REPOSITORY"`` with the same files; a model of timm as ``"timm:NAME"`` or
            ``"timm:NAME.TAG"``; or a model of transformers as ``"hf:ORG/REPOSITORY"``,
            ``"hf:FOLDER"`` or the folder.
        pretrained: A tag of open_clip (of timm for ``"timm:NAME"``), a file,
            ``"hf-hub:ORG/REPOSITORY"``, ``"none"`` for random weights, or None for the default
            (OpenAI's weights, timm's default, or those of the folder).
        activation: ``"gelu"`` or ``"quick_gelu"``, for a file if the name does not tell.
        device: Device of the tower.

    Raises:
        UnknownNameError: No family knows ``name``; the message names the closest known name.
        WeightsError: The weights are not available, do not fit, or are not finite.
        CheckpointError: ``name`` is a directory without a valid checkpoint.
        OptionError: An option does not apply to a slim checkpoint, or the device is not available.
    """
    from ovsprune.backbones.checkpoints import load_masked, load_slim
    from ovsprune.backbones.open_clip_source import describes_itself
    from ovsprune.backbones.transformers_source import is_transformers
    from ovsprune.masks.directory import is_unstructured

    if describes_itself(name):
        backbone = _family_by_config(name).load(name, pretrained, activation)
    elif is_transformers(name):
        backbone = FAMILIES.get("transformers-vit").load(name, pretrained, activation)
    elif _is_checkpoint(name):
        if pretrained or activation:
            raise OptionError(
                f"{name} is a slim checkpoint and brings its weights and its activation; leave "
                "--pretrained and --activation out"
            )
        directory = Path(name)
        backbone = load_masked(directory) if is_unstructured(directory) else load_slim(directory)
    else:
        backbone = _family_by_name(name).load(canonical(name), pretrained, activation)
    _check_finite(backbone)
    try:
        backbone.tower.to(device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"device {device!r} cannot be used here: {error}") from error
    return backbone


def _check_finite(backbone: Backbone) -> None:
    for name, tensor in backbone.tower.state_dict().items():
        if not tensor.isfinite().all():
            raise WeightsError(
                f"{backbone.name}: {name} holds values that are not finite; the weights are damaged"
            )


def _is_checkpoint(name: str) -> bool:
    """Return True for a directory; one with a model's name must contain a checkpoint."""
    path = Path(name)
    return path.is_dir() and (
        (path / "config.json").is_file() or canonical(name) not in model_names()
    )


def canonical(name: str) -> str:
    """Return the name in open_clip's spelling (``ViT-B-16`` for ``ViT-B/16``).

    For a folder or a repository on the hub it is the last part, for timm the name without prefix.
    """
    from ovsprune.backbones import timm_source
    from ovsprune.backbones.hub import repository_of
    from ovsprune.backbones.open_clip_folder import is_folder
    from ovsprune.backbones.transformers_source import is_transformers, short_name

    if is_transformers(name):
        return short_name(name)
    if timm_source.is_timm(name):
        return name.removeprefix(timm_source.PREFIX)
    repository = repository_of(name)
    if repository is not None:
        return repository.rpartition("/")[2]
    path = Path(name)
    is_model = is_folder(path) or (path / "config.json").is_file()
    return path.resolve().name if is_model else name.replace("/", "-")


def _family_by_name(name: str) -> Family:
    for key in FAMILIES:
        family = FAMILIES.get(key)
        if canonical(name) in family.names():
            return family
    from ovsprune.backbones.timm_source import prefixed

    raise UnknownNameError("model", name, (*model_names(), *prefixed(name)))


def _family_by_config(name: str) -> Family:
    from ovsprune.backbones.open_clip_source import config_of

    config = config_of(name)
    for key in FAMILIES:
        family = FAMILIES.get(key)
        if family.takes(config):
            return family
    raise WeightsError(f"{name} holds a model of none of the families {', '.join(FAMILIES)}")
