"""What families of open_clip share: the CLIP around a tower, its text side, its preprocessing."""

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
    """Whether there is a text tower, and open_clip has it itself, and not from a hub."""
    text = config["text_cfg"]
    return text is not None and not text.get("hf_model_name")


def build_clip(config: Mapping[str, Any]) -> nn.Module:
    """open_clip's model from its configuration, random weights drawn from a fixed seed.

    A text tower that lives on a hub is not built: ``visual`` is all there is then, as where the
    configuration's ``text_cfg`` is None.
    """
    import open_clip

    if not has_own_text(config):
        return nn.ModuleDict({"visual": build_timm_tower(config)})
    chosen = {k: v for k, v in deepcopy(dict(config)).items() if k != "custom_text"}
    # Nothing is downloaded behind a user's back: weights come from what was named.
    chosen["vision_cfg"]["timm_model_pretrained"] = False
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model: nn.Module = clip_class(open_clip, config)(**chosen)
    return model.eval().requires_grad_(False)


def fit_text(name: str, text: Mapping[str, Tensor], model: nn.Module) -> None:
    """Load everything but the image tower into a CLIP, all of it or nothing.

    Raises:
        WeightsError: Keys are missing, unexpected or of other shapes.
    """
    tower = {k: v for k, v in model.state_dict().items() if k.startswith("visual.")}
    fit(name, "the text tower", {**tower, **text}, model)


def encoder_of(model: nn.Module, config: Mapping[str, Any]) -> Callable[[Sequence[str]], Tensor]:
    """Texts to L2-normalised embeddings [K, C], with the tokenizer that open_clip takes."""

    def encode(texts: Sequence[str]) -> Tensor:
        clip: Any = model
        tokens = _tokenizer(config["text_cfg"])(list(texts))
        embeddings: Tensor = clip.encode_text(tokens.to(clip.logit_scale.device))
        return F.normalize(embeddings.float(), dim=1)

    return encode


def _tokenizer(text: Mapping[str, Any]) -> Callable[[list[str]], Tensor]:
    """open_clip's own tokenizer, or the one on the hub that a text configuration names.

    Raises:
        WeightsError: It is on the hub, and neither there nor in the cache.
    """
    from open_clip import tokenizer

    name, length = text.get("hf_tokenizer_name"), text.get("context_length", 77)
    options = {"context_length": length, **text.get("tokenizer_kwargs", {})}
    made: Callable[[list[str]], Tensor]
    if not name:
        made = tokenizer.SimpleTokenizer(**options)
        return made
    options["tokenizer_mode"] = text.get("tokenizer_mode")
    try:
        made = tokenizer.HFTokenizer(name, local_files_only=True, **options)
    except Exception:  # libraries of the hub raise what they like
        from huggingface_hub import constants

        what, ways_out = f"the files of the tokenizer {name!r}", "--text-embeddings FILE.npz, made "
        ways_out += "on another machine, or that machine's cache (HF_HOME)"
        hub.knock(constants.ENDPOINT, what, ways_out)
        try:
            made = tokenizer.HFTokenizer(name, **options)
        except Exception as error:
            raise hub.unreachable(what, hub.first_line(error), ways_out) from error
    return made


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
