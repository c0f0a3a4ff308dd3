"""Backbone families: how towers load, come apart and go together again. One family a file."""

from __future__ import annotations

from pathlib import Path

from ovsprune.core.errors import OptionError, UnknownNameError, WeightsError
from ovsprune.core.protocols import Backbone, Family
from ovsprune.core.registry import Registry

__all__ = ["FAMILIES", "load_backbone", "model_names"]

FAMILIES: Registry[Family] = Registry("backbone family", "ovsprune.backbones")


def model_names() -> tuple[str, ...]:
    """Every name that :func:`load_backbone` takes, besides directories."""
    return tuple(sorted({name for family in FAMILIES for name in FAMILIES.get(family).names()}))


def load_backbone(
    name: str,
    *,
    pretrained: str | None = None,
    activation: str | None = None,
    device: str = "cpu",
) -> Backbone:
    """Load a model: its image tower, preprocessing and, where it has one, its text tower.

    Args:
        name: ``"tiny"``, an open_clip name, a name as people write it (``"ViT-B/16"``), the
            directory of a slim checkpoint or of an unstructured result, a folder that open_clip
            reads by ``local-dir:`` (``open_clip_config.json`` and weights, those of the image
            tower alone if need be), ``"hf-hub:ORG/REPOSITORY"`` with the same files, a model of
            timm's as ``"timm:NAME"`` or ``"timm:NAME.TAG"``, or a model of transformers as
            ``"hf:ORG/REPOSITORY"`` or ``"hf:FOLDER"``, or that folder.
        pretrained: A tag of open_clip's (of timm's for ``"timm:NAME"``), a file,
            ``"hf-hub:ORG/REPOSITORY"``, ``"none"`` for random weights, or None for the default
            (OpenAI's where the name has them; timm's own).
        activation: ``"gelu"`` or ``"quick_gelu"``, for a file whose activation its name does not
            tell.
        device: Where the tower goes.

    Raises:
        UnknownNameError: No family knows ``name``; names the closest.
        WeightsError: The weights cannot be had, do not fit, or are not finite.
        CheckpointError: ``name`` is a directory and no sound slim checkpoint.
        OptionError: An option that a slim checkpoint does not take, or a bad device.
    """
    from ovsprune.backbones.masked_checkpoint import load_masked
    from ovsprune.backbones.open_clip_source import describes_itself
    from ovsprune.backbones.slim_checkpoint import load_slim
    from ovsprune.backbones.transformers_source import is_transformers
    from ovsprune.masks.directory import is_unstructured

    if describes_itself(name):
        backbone = _family_that_takes(name).load(name, pretrained, activation)
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
        backbone = _family_of(name).load(canonical(name), pretrained, activation)
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
    """Whether ``name`` means a directory; a model's name does not, unless a checkpoint is there."""
    path = Path(name)
    return path.is_dir() and (
        (path / "config.json").is_file() or canonical(name) not in model_names()
    )


def canonical(name: str) -> str:
    """The name as open_clip writes it (``ViT-B/16`` is ``ViT-B-16``).

    Of a folder, and of a repository on the hub, its last part; of timm's what follows the prefix.
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
    here = is_folder(path) or (path / "config.json").is_file()
    return path.resolve().name if here else name.replace("/", "-")


def _family_of(name: str) -> Family:
    for key in FAMILIES:
        family = FAMILIES.get(key)
        if canonical(name) in family.names():
            return family
    from ovsprune.backbones.timm_source import prefixed

    raise UnknownNameError("model", name, (*model_names(), *prefixed(name)))


def _family_that_takes(name: str) -> Family:
    from ovsprune.backbones.open_clip_source import config_of

    config = config_of(name)
    for key in FAMILIES:
        family = FAMILIES.get(key)
        if family.takes(config):
            return family
    raise WeightsError(f"{name} holds a model of none of the families {', '.join(FAMILIES)}")
