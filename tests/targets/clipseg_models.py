"""Small CLIPSegs of transformers with lively weights, for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ovsprune.targets import TARGETS
from tests.targets.by_hand import SMALL, SMALL_MLP, put

EXTRACT = (0, 2, 3)


def clipseg(
    tower: Mapping[str, Tensor],
    *,
    heads: int = 4,
    size: int = SMALL["size"],
    activation: str = "quick_gelu",
    extract: tuple[int, ...] = EXTRACT,
    seed: int = 0,
) -> Any:
    """Build CLIPSegForImageSegmentation around ``tower``, with random parameters."""
    transformers = pytest.importorskip("transformers")
    depth = len({n.split(".")[2] for n in tower if n.startswith("transformer.resblocks.")})
    width, _, patch, _ = tower["conv1.weight"].shape
    config = transformers.CLIPSegConfig(
        vision_config={
            "hidden_size": width,
            "intermediate_size": tower["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "image_size": size,
            "patch_size": patch,
            "hidden_act": activation,
        },
        text_config={
            "hidden_size": 16,
            "intermediate_size": SMALL_MLP,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 64,
            "max_position_embeddings": 12,
            "eos_token_id": 63,
        },
        projection_dim=tower["proj"].shape[1],
        extract_layers=list(extract),
        reduce_dim=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: nn.Module = transformers.CLIPSegForImageSegmentation(config)
        for name, parameter in model.named_parameters():  # the library starts biases at zero
            if parameter.ndim <= 1 and "logit_scale" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif name.startswith("decoder."):
                parameter.mul_(3.0)
    put(model, tower, TARGETS.get("clipseg").layout(model.state_dict(), depth))
    return model.eval()


WORDS = torch.tensor([[1, 7, 9, 63, 0, 0], [1, 30, 12, 11, 63, 0]])


def outputs(model: Any, images: Tensor) -> dict[str, Tensor]:
    """Return masks, pooled embedding and the streams that the decoder reads."""
    found = model(pixel_values=images, input_ids=WORDS[: len(images)], output_hidden_states=True)
    streams = found.vision_model_output.hidden_states
    picked = {f"stream {i}": streams[i + 1] for i in model.extract_layers}
    return {"logits": found.logits, "pooled": found.pooled_output, **picked}
