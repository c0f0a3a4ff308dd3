"""CLIPSeg of transformers (``CLIPSegForImageSegmentation``): a decoder over a frozen CLIP ViT."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ovsprune.core.errors import TargetError
from ovsprune.slim import SlimCheckpoint
from ovsprune.targets.framework import TableTarget
from ovsprune.targets.key_map import KeyMap
from ovsprune.targets.layout import POSITIONS, BlockStack, Layout, hf_block
from ovsprune.targets.registry import TARGETS
from ovsprune.targets.surgery import cuts_of, slim_copy

_VISION, _TEXT = "clip.vision_model", "clip.text_model"

_KEY_MAP = KeyMap(
    framework="CLIPSeg of transformers",
    stem={
        "class_embedding": f"{_VISION}.embeddings.class_embedding",
        "conv1": f"{_VISION}.embeddings.patch_embedding",
        POSITIONS: f"{_VISION}.embeddings.position_embedding.weight",
        "ln_pre": f"{_VISION}.pre_layrnorm",
        "ln_post": f"{_VISION}.post_layernorm",
        "proj": "clip.visual_projection.weight",
    },
    stacks=(BlockStack(f"{_VISION}.encoder.layers", hf_block()),),
    marks=("decoder.film_mul", "decoder.reduces"),
    transposed=("proj",),
    activations=(f"{_VISION}.encoder.layers.0.mlp.activation_fn",),
    text=Layout(
        stem={
            "token_embedding": f"{_TEXT}.embeddings.token_embedding",
            POSITIONS: f"{_TEXT}.embeddings.position_embedding.weight",
            "ln_final": f"{_TEXT}.final_layer_norm",
            "text_projection": "clip.text_projection.weight",
            "logit_scale": "clip.logit_scale",
        },
        stacks=(BlockStack(f"{_TEXT}.encoder.layers", hf_block()),),
        transposed=("text_projection",),
    ),
)

_SCRIPT = """\
# where the model is created; config.json was copied if the dense checkpoint had one
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

import ovsprune.targets  # pip install --no-deps ovsprune

directory = {output!r}
model = CLIPSegForImageSegmentation(CLIPSegConfig.from_pretrained(directory))
ovsprune.targets.load_into(model, directory)  # replaces modules, loads every tensor
model.eval()

# from_pretrained alone builds dense layers and refuses the slim tensors because of their shapes.
"""


def _inputs(model: Any) -> Mapping[str, Any]:
    """Return one image of the native size and one text of the maximum length."""
    side = model.config.vision_config.image_size
    length = model.config.text_config.max_position_embeddings
    return {
        "pixel_values": torch.zeros(1, 3, side, side),
        "input_ids": torch.zeros(1, length, dtype=torch.int64),
    }


@torch.no_grad()
def _check_head_count(model: nn.Module, checkpoint: SlimCheckpoint, layout: Layout) -> None:
    """Refuse a version of transformers whose attention cannot run with fewer heads.

    Runs the forward pass of one attention with cut linear layers; one of them is enough, because
    all of them are of the same class.
    """
    cuts = cuts_of(checkpoint, layout)
    for layer in checkpoint.spec.layers:
        path = layout.name(layer.name)
        # each cut is a linear layer of the attention
        layer_cuts = [cut for cut in cuts if cut.path.startswith(f"{path}.")]
        if not layer.is_whole_attention or path is None or not layer_cuts:
            continue
        attention = model.get_submodule(path)
        trial = copy.copy(attention)
        trial._modules = dict(attention._modules)  # the model itself is not touched
        for cut in layer_cuts:
            leaf = cut.path.removeprefix(f"{path}.")
            trial._modules[leaf] = slim_copy(model.get_submodule(cut.path), cut)
        weight = attention.get_parameter("out_proj.weight")
        try:
            type(attention).forward(trial, hidden_states=weight.new_zeros(1, 2, weight.shape[0]))
        except RuntimeError as error:
            raise TargetError(
                f"{path} cannot have {layer.kept} of {layer.units} heads ({error}): this version "
                "of transformers takes the number of heads from its configuration; install one "
                "that derives it from the width of the layers (5.6 or later)"
            ) from None
        return


@TARGETS.register("clipseg")
def clipseg() -> TableTarget:
    """Target for CLIPSeg of transformers; live models, and folders that save_pretrained wrote."""
    return TableTarget(
        name="clipseg",
        framework="transformers' CLIPSegForImageSegmentation (transformers 5.6 or later)",
        key_map=_KEY_MAP,
        takes=("vit",),
        protects={
            "residual width": "the decoder's reduces read it after three blocks (extract_layers)",
            "depth": "extract_layers counts blocks",
            "projection": "the decoder is conditioned on text embeddings of the dense width",
            POSITIONS: "the model interpolates them from the grid that it was built with",
        },
        trainable=("decoder.*", f"{_VISION}.*", "clip.visual_projection.weight"),
        script=_SCRIPT,
        checks=(_check_head_count,),
        inputs=_inputs,
        no_grad_methods=("clip.vision_model.forward",),
        files=(
            "config.json",
            "preprocessor_config.json",
            "processor_config.json",
            "tokenizer_config.json",
            "tokenizer.json",
            "vocab.json",
            "merges.txt",
            "special_tokens_map.json",
            "added_tokens.json",
        ),
        obsolete_keys={"*.position_ids": "computed by the model since transformers 4.31"},
    )
