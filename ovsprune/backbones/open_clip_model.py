"""What families of open_clip share: the CLIP around a tower, how it loads, its text side."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsprune.backbones.open_clip_folder import Folder, is_folder, open_folder
from ovsprune.backbones.pretrained import default_tag, fit, read_state, resolve
from ovsprune.core.errors import OptionError
from ovsprune.core.protocols import Backbone, Stages
from ovsprune.core.records import Preprocess

__all__ = [
    "Clip",
    "build_clip",
    "encoder_of",
    "fit_text",
    "is_plain_clip",
    "load_clip",
    "load_folder",
    "load_named",
    "named_config",
    "preprocess_of",
    "rebuild_clip",
]

_GELUS = ("gelu", "quick_gelu")


@dataclass(frozen=True, eq=False)
class Clip:
    """A built CLIP, whatever its image tower is.

    Attributes:
        name: The model's name.
        pretrained: Tag, file name, or None for random weights.
        model: open_clip's CLIP.
        config: Its model configuration, with the activation that the weights have.
        preprocess: How pictures become its input.
        trained: Whether the image tower's weights are.
        has_text: Whether the text tower's are there.
    """

    name: str
    pretrained: str | None
    model: nn.Module
    config: Mapping[str, Any]
    preprocess: Preprocess
    trained: bool
    has_text: bool = True

    def backbone(
        self, family: str, activation: str, stages: Callable[[nn.Module], Stages]
    ) -> Backbone:
        """The backbone record.

        Args:
            family: Name in the registry of families.
            activation: Of the image tower.
            stages: The family's own.
        """
        import open_clip

        state = self.model.state_dict() if self.has_text else {}
        return Backbone(
            name=self.name,
            pretrained=self.pretrained,
            trained=self.trained,
            family=family,
            tower=self.model.get_submodule("visual"),
            stages=stages,
            preprocess=self.preprocess,
            activation=activation,
            architecture=dict(self.config),
            library_version=open_clip.__version__,
            text={k: v for k, v in state.items() if not k.startswith("visual.")},
            encoder=encoder_of(self.model, self.config) if self.has_text else None,
        )


def load_clip(name: str, pretrained: str | None, activation: str | None) -> Clip:
    """Build the CLIP called ``name`` and load its weights.

    The activation (of the GELUs: a ResNet has none in its image tower) is the pretrained tag's own
    (OpenAI's tags are QuickGELU, also under the plain name, for which open_clip builds GELU and
    only warns); for a bare file the name's (``-quickgelu``), or what ``activation`` says.

    Args:
        name: open_clip's, or a folder of its form.
        pretrained: A tag, a file, ``"none"``, or None for the default.
        activation: ``"gelu"``, ``"quick_gelu"``, or None.

    Raises:
        WeightsError: The weights cannot be had or do not fit.
        OptionError: ``activation`` is unknown, or contradicts the tag's own.
    """
    if is_folder(Path(name)) and pretrained is None:
        path = Path(name)
        return load_folder(path.resolve().name, "local", open_folder(path), activation)
    return load_named(name, named_config(name), pretrained, activation)


def load_named(
    name: str, config: Mapping[str, Any], pretrained: str | None, activation: str | None
) -> Clip:
    """As :func:`load_clip`, of a given configuration and no folder's own weights."""
    _check_known(activation)
    preprocess: dict[str, Any] = {}
    state: dict[str, Tensor] | None = None
    path = Path()
    quick = bool(config.get("quick_gelu", False))
    if pretrained != "none":
        if pretrained is not None and Path(pretrained).is_file():
            path = Path(pretrained)
        else:
            pretrained = pretrained or default_tag(name)
            path, preprocess = resolve(name, pretrained)
            quick = bool(preprocess.get("quick_gelu", False))
            _check_activation(name, pretrained, quick, activation)
        state = read_state(path)
    if activation is not None:
        quick = activation == "quick_gelu"
    chosen = {**config, "quick_gelu": quick}
    model = build_clip(chosen)
    if state is not None:
        fit(name, path, state, model)
    return Clip(
        name,
        None if pretrained == "none" else Path(pretrained or "").name,
        model,
        chosen,
        preprocess_of(model.visual, preprocess),
        trained=state is not None,
    )


def load_folder(name: str, tag: str, folder: Folder, activation: str | None) -> Clip:
    """A folder's model; one with weights of the image tower alone has no text tower.

    Args:
        name: The model's name.
        tag: What its weights are called.
        folder: What it holds.
        activation: ``"gelu"``, ``"quick_gelu"``, or None.

    Raises:
        WeightsError: The weights do not fit.
        OptionError: ``activation`` is unknown, or not the folder's own.
    """
    _check_known(activation)
    config = folder.model
    _check_activation(name, tag, bool(config.get("quick_gelu", False)), activation)
    model = build_clip(config)
    state = folder.state()
    tower_only = all(key.startswith("visual.") for key in state)
    if tower_only:
        bare = {key.removeprefix("visual."): value for key, value in state.items()}
        fit(name, folder.weights, bare, model.get_submodule("visual"))
    else:
        fit(name, folder.weights, state, model)
    preprocess = preprocess_of(model.visual, folder.preprocess)
    return Clip(name, tag, model, config, preprocess, trained=True, has_text=not tower_only)


def rebuild_clip(
    name: str,
    pretrained: str | None,
    architecture: Mapping[str, Any],
    preprocess: Preprocess,
    *,
    trained: bool,
    text: Mapping[str, Tensor],
) -> Clip:
    """The dense CLIP that a checkpoint was made from, its image tower with random weights.

    The arguments are those of :meth:`ovsprune.core.protocols.Family.build`.

    Raises:
        WeightsError: ``text`` does not fit.
    """
    model = build_clip(architecture)
    if text:
        fit_text(name, text, model)
    return Clip(name, pretrained, model, architecture, preprocess, trained, has_text=bool(text))


def named_config(name: str) -> dict[str, Any]:
    """open_clip's model configuration of a name, or of a folder of its form; a copy."""
    import open_clip

    if is_folder(Path(name)):
        return deepcopy(dict(open_folder(Path(name)).model))
    config = open_clip.get_model_config(name)
    assert config is not None
    return deepcopy(config)


def is_plain_clip(config: Mapping[str, Any]) -> bool:
    """Whether the CLIP around the image tower is open_clip's own plain one."""
    return (
        "timm_model_name" not in config["vision_cfg"]
        and "hf_model_name" not in config["text_cfg"]
        and "multimodal_cfg" not in config
        and not config.get("custom_text", False)
    )


def _check_known(activation: str | None) -> None:
    if activation is not None and activation not in _GELUS:
        raise OptionError(f"--activation {activation!r} is unknown; known: {', '.join(_GELUS)}")


def _check_activation(name: str, tag: str, quick: bool, activation: str | None) -> None:
    own = "quick_gelu" if quick else "gelu"
    if activation is not None and activation != own:
        raise OptionError(
            f"the weights {tag!r} of {name} were trained with {own}, not {activation}; leave "
            "--activation out"
        )


def build_clip(config: Mapping[str, Any]) -> nn.Module:
    """open_clip's CLIP from its model configuration, random weights drawn from a fixed seed."""
    import open_clip

    chosen = {k: v for k, v in deepcopy(dict(config)).items() if k != "custom_text"}
    # Nothing is downloaded behind a user's back: weights come from what was named.
    chosen["vision_cfg"]["timm_model_pretrained"] = False
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model: nn.Module = open_clip.CLIP(**chosen)
    return model.eval().requires_grad_(False)


def fit_text(name: str, text: Mapping[str, Tensor], model: nn.Module) -> None:
    """Load everything but the image tower into a CLIP, all of it or nothing.

    Raises:
        WeightsError: Keys are missing, unexpected or of other shapes.
    """
    tower = {k: v for k, v in model.state_dict().items() if k.startswith("visual.")}
    fit(name, "the text tower", {**tower, **text}, model)


def encoder_of(model: nn.Module, config: Mapping[str, Any]) -> Callable[[Sequence[str]], Tensor]:
    """Texts to L2-normalised embeddings [K, C], with open_clip's own tokenizer."""

    def encode(texts: Sequence[str]) -> Tensor:
        from open_clip.tokenizer import SimpleTokenizer

        tokenizer = SimpleTokenizer(context_length=config["text_cfg"].get("context_length", 77))
        clip: Any = model
        embeddings: Tensor = clip.encode_text(tokenizer(list(texts)).to(clip.logit_scale.device))
        return F.normalize(embeddings.float(), dim=1)

    return encode


def preprocess_of(tower: Any, overrides: Mapping[str, Any]) -> Preprocess:
    """The native size of a tower, with what a configuration says of the pictures."""
    size = tower.image_size
    defaults = Preprocess(size=(size, size) if isinstance(size, int) else tuple(size))
    return Preprocess(
        size=defaults.size,
        mean=tuple(overrides.get("mean", defaults.mean)),
        std=tuple(overrides.get("std", defaults.std)),
        interpolation=overrides.get("interpolation", defaults.interpolation),
        resize_mode=overrides.get("resize_mode", defaults.resize_mode),
    )
