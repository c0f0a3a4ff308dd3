"""What families of open_clip share: the CLIP around a tower, its text side, its preprocessing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsprune.backbones.pretrained import fit
from ovsprune.core.errors import WeightsError
from ovsprune.core.records import Preprocess

__all__ = [
    "build_clip",
    "canonical_state",
    "encoder_of",
    "fit_text",
    "missing_tokenizer",
    "preprocess_of",
]

Encoder = Callable[[Sequence[str]], Tensor]


def build_clip(config: Mapping[str, Any]) -> nn.Module:
    """open_clip's CLIP from its model configuration, random weights drawn from a fixed seed.

    A CLIP whose text tower is a module of its own (``custom_text``) is one of ``CustomTextCLIP``.
    """
    import open_clip

    chosen = {k: v for k, v in deepcopy(dict(config)).items() if k != "custom_text"}
    # Nothing is downloaded behind a user's back: weights come from what was named.
    chosen["vision_cfg"]["timm_model_pretrained"] = False
    build = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model: nn.Module = build(**chosen)
    return model.eval().requires_grad_(False)


def fit_text(name: str, text: Mapping[str, Tensor], model: nn.Module) -> None:
    """Load everything but the image tower into a CLIP, all of it or nothing.

    Raises:
        WeightsError: Keys are missing, unexpected or of other shapes.
    """
    tower = {k: v for k, v in model.state_dict().items() if k.startswith("visual.")}
    fit(name, "the text tower", {**tower, **text}, model)


def canonical_state(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a whole CLIP in float32, by the names that open_clip gives them now.

    As open_clip does in loading: an old file's text tower moves to ``text.`` where the model has it
    there, and the logit's scale and bias, which some files have as [1], get the model's shape.
    """
    from open_clip.model import convert_to_custom_text_state_dict

    found = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    if config.get("custom_text") and "positional_embedding" in found:
        found = dict(convert_to_custom_text_state_dict(found))
    shape = (1,) if config.get("nonscalar_logit_scale") else ()
    for name in ("logit_scale", "logit_bias"):
        if name in found and found[name].numel() == 1:
            found[name] = found[name].reshape(shape)
    return found


def missing_tokenizer(config: Mapping[str, Any]) -> str:
    """Why texts cannot be told to the model's text tower here, or an empty string."""
    text = config["text_cfg"]
    if text.get("hf_model_name"):
        return f"its text tower {text['hf_model_name']} lives on a hub"
    name = text.get("hf_tokenizer_name")
    if name and _cached_tokenizer(name) is None:
        return f"its tokenizer {name} lives on a hub and is not in the local cache"
    return ""


def _cached_tokenizer(name: str) -> str | None:
    """Folder of a hub's tokenizer in the local cache; the hub is not asked."""
    import huggingface_hub

    found = huggingface_hub.try_to_load_from_cache(name, "tokenizer_config.json")
    return str(Path(found).parent) if isinstance(found, str) else None


def _tokenizer(text: Mapping[str, Any]) -> Callable[[list[str]], Tensor]:
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    options = {"context_length": text.get("context_length", 77), **text.get("tokenizer_kwargs", {})}
    name = text.get("hf_tokenizer_name")
    tokenizer: Callable[[list[str]], Tensor]
    tokenizer = (
        HFTokenizer(_cached_tokenizer(name), **options) if name else (SimpleTokenizer(**options))
    )
    return tokenizer


def encoder_of(model: nn.Module, config: Mapping[str, Any]) -> Encoder:
    """Texts to L2-normalised embeddings [K, C], with the tokenizer that open_clip takes for it.

    One that lives on a hub must be in the local cache (:func:`missing_tokenizer`).
    """

    def encode(texts: Sequence[str]) -> Tensor:
        missing = missing_tokenizer(config)
        if missing:
            raise WeightsError(f"no text can be encoded: {missing}")
        tokenizer = _tokenizer(config["text_cfg"])
        clip: Any = model
        embeddings: Tensor = clip.encode_text(tokenizer(list(texts)).to(clip.logit_scale.device))
        return F.normalize(embeddings.float(), dim=1)

    return encode


def preprocess_of(tower: Any, overrides: Mapping[str, Any]) -> Preprocess:
    """The native size of a tower, with what a configuration says of the pictures."""
    size = tower.image_size
    defaults = Preprocess(size=tuple(size))
    return Preprocess(
        size=defaults.size,
        mean=tuple(overrides.get("mean", defaults.mean)),
        std=tuple(overrides.get("std", defaults.std)),
        interpolation=overrides.get("interpolation", defaults.interpolation),
        resize_mode=overrides.get("resize_mode", defaults.resize_mode),
    )
