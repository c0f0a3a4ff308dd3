"""open_clip's models: build one from its configuration, encode texts, and its preprocessing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsprune.backbones import hub
from ovsprune.backbones.fitting import fit
from ovsprune.core.records import Preprocess
from ovsprune.slim.clip import clip_class
from ovsprune.slim.timm_tower import build_timm_tower

__all__ = ["build_clip", "encoder_of", "fit_text", "has_own_text", "preprocess_of"]


def has_own_text(config: Mapping[str, Any]) -> bool:
    """Return True if open_clip builds the text tower itself, without a model of a hub."""
    text = config["text_cfg"]
    return text is not None and not text.get("hf_model_name")


def build_clip(config: Mapping[str, Any]) -> nn.Module:
    """Build the model of open_clip's configuration, with random weights from a fixed seed.

    Without a text tower, or with one from a hub, the only child of the result is ``visual``.
    """
    import open_clip

    if not has_own_text(config):
        return nn.ModuleDict({"visual": build_timm_tower(config)})
    arguments = {k: v for k, v in deepcopy(dict(config)).items() if k != "custom_text"}
    # Prevents a download of timm's weights: the weights are those that the user named.
    arguments["vision_cfg"]["timm_model_pretrained"] = False
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model: nn.Module = clip_class(open_clip, config)(**arguments)
    return model.eval().requires_grad_(False)


def fit_text(name: str, text: Mapping[str, Tensor], model: nn.Module) -> None:
    """Load all tensors outside the image tower into a CLIP.

    Raises:
        WeightsError: Keys are missing, unexpected or of another shape; nothing is loaded.
    """
    tower = {k: v for k, v in model.state_dict().items() if k.startswith("visual.")}
    fit(name, "the text tower", {**tower, **text}, model)


def encoder_of(model: nn.Module, config: Mapping[str, Any]) -> Callable[[Sequence[str]], Tensor]:
    """Return a function of K texts that computes L2-normalised embeddings [K, C]."""

    def encode(texts: Sequence[str]) -> Tensor:
        clip: Any = model
        tokens = _tokenizer(config["text_cfg"])(list(texts))  # [K, context length]
        embeddings: Tensor = clip.encode_text(tokens.to(clip.logit_scale.device))  # [K, C]
        return F.normalize(embeddings.float(), dim=1)

    return encode


def _tokenizer(text: Mapping[str, Any]) -> Callable[[list[str]], Tensor]:
    """Return the tokenizer of a text configuration; WeightsError if it cannot be loaded."""
    from open_clip import tokenizer

    name, length = text.get("hf_tokenizer_name"), text.get("context_length", 77)
    options = {"context_length": length, **text.get("tokenizer_kwargs", {})}
    tokenize: Callable[[list[str]], Tensor]
    if not name:
        tokenize = tokenizer.SimpleTokenizer(**options)
        return tokenize
    options["tokenizer_mode"] = text.get("tokenizer_mode")
    try:
        tokenize = tokenizer.HFTokenizer(name, local_files_only=True, **options)
    except Exception:  # the hub's libraries do not document what they raise
        from huggingface_hub import constants

        subject = f"the files of the tokenizer {name!r}"
        remedy = (
            "--text-embeddings FILE.npz, made on another machine, or that machine's cache (HF_HOME)"
        )
        hub.check_reachable(constants.ENDPOINT, subject, remedy)
        try:
            tokenize = tokenizer.HFTokenizer(name, **options)
        except Exception as error:
            raise hub.unreachable(subject, hub.first_line(error), remedy) from error
    return tokenize


def preprocess_of(tower: Any, overrides: Mapping[str, Any]) -> Preprocess:
    """Return the preprocessing of a tower.

    Args:
        tower: Image tower of open_clip; it gives the input size.
        overrides: Preprocessing configuration of the weights; may be empty.
    """
    size = tower.image_size
    defaults = Preprocess(size=(size, size) if isinstance(size, int) else tuple(size))
    # A trunk of timm may take no other size than that of its patch embedding. open_clip's
    # configuration of ViTamin-XL-384 says 256.
    patch_embed = getattr(getattr(tower, "trunk", None), "patch_embed", None)
    trunk_size: Any = getattr(patch_embed, "img_size", None)
    return Preprocess(
        size=(trunk_size[0], trunk_size[1]) if trunk_size else defaults.size,
        mean=tuple(overrides.get("mean", defaults.mean)),
        std=tuple(overrides.get("std", defaults.std)),
        interpolation=overrides.get("interpolation", defaults.interpolation),
        resize_mode=overrides.get("resize_mode", defaults.resize_mode),
    )
