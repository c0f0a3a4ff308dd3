"""Small models of transformers, with values in every parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

SIZE = 32
_BLOCKS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 8,
}
_VISION = {**_BLOCKS, "intermediate_size": 48, "image_size": SIZE}
_NAFLEX = {**_BLOCKS, "intermediate_size": 48, "num_patches": (SIZE // 8) ** 2}
_TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 60,
    "max_position_embeddings": 12,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "CLIPVisionModel": _VISION,
    "CLIPVisionModelWithProjection": {**_VISION, "projection_dim": 24},
    "SiglipVisionModel": _VISION,
    "Siglip2VisionModel": _NAFLEX,
    "Dinov2Model": {**_BLOCKS, "image_size": SIZE, "mlp_ratio": 2},
}
"""Configuration of each class of vision towers."""

WHOLE: dict[str, dict[str, Any]] = {
    "CLIPModel": {"projection_dim": 24, "vision_config": _VISION, "text_config": _TEXT},
    "SiglipModel": {
        "vision_config": _VISION,
        "text_config": {**_TEXT, "hidden_size": 32, "num_attention_heads": 4},
    },
}


def make(name: str, seed: int = 0, attention: str = "sdpa", **more: Any) -> nn.Module:
    """Build a transformers model of the class ``name``, with random values in every parameter."""
    import transformers

    model_class = getattr(transformers, name)
    config = model_class.config_class(**{**(CONFIGS | WHOLE)[name], **more})
    config._attn_implementation = attention
    model = model_class(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        scale = "norm" in key and key.endswith("weight")
        noise = torch.randn(parameter.shape, generator=generator)
        if scale or key.endswith("lambda1"):
            parameter.copy_(1 + 0.4 * noise)
        else:
            parameter.copy_(0.2 * noise)
    return model  # type: ignore[no-any-return]


def folder_of(model: Any, folder: Path) -> Path:
    """Save the model with ``save_pretrained`` and return the folder."""
    model.save_pretrained(folder)
    return folder
