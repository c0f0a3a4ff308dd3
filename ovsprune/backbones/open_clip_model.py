"""What families of open_clip share: the CLIP around a tower, its text side, its preprocessing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsprune.backbones.pretrained import fit
from ovsprune.core.records import Preprocess

__all__ = ["build_clip", "encoder_of", "fit_text", "preprocess_of"]


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
    defaults = Preprocess(size=tuple(size))
    return Preprocess(
        size=defaults.size,
        mean=tuple(overrides.get("mean", defaults.mean)),
        std=tuple(overrides.get("std", defaults.std)),
        interpolation=overrides.get("interpolation", defaults.interpolation),
        resize_mode=overrides.get("resize_mode", defaults.resize_mode),
    )
