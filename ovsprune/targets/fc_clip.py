"""FC-CLIP (bytedance/fc-clip, detectron2) on CLIP's ResNets and on open_clip's ConvNeXts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ovsprune.slim.attach import Swap
from ovsprune.targets.detectron2_rules import image_inputs, script_for
from ovsprune.targets.framework import TableTarget
from ovsprune.targets.key_map import KeyMap
from ovsprune.targets.layout import clip_text
from ovsprune.targets.registry import TARGETS

_CLIP = "backbone.clip_model"

_RESNET = KeyMap(
    framework="FC-CLIP",
    stem={"": f"{_CLIP}.visual"},
    marks=(f"{_CLIP}.visual.layer1", "sem_seg_head.pixel_decoder", "void_embedding"),
    activations=(f"{_CLIP}.visual.layer1.0.act1",),
    text=clip_text(_CLIP),
)
_CONVNEXT = replace(
    _RESNET,
    marks=(f"{_CLIP}.visual.trunk.stages", *_RESNET.marks[1:]),
    activations=(f"{_CLIP}.visual.trunk.stages.0.blocks.0.mlp.act",),
)


@dataclass
class _EncodeText:
    """Replacement of FC-CLIP's ``encode_text`` that calls the one of open_clip.

    FC-CLIP's version passes [L, N, E] to the text transformer; open_clip expects [N, L, E] after
    2.24. An object and not a function, so that a copied or pickled model refers to its own
    backbone.
    """

    backbone: Any

    def __call__(self, text: Tensor, normalize: bool = False) -> Tensor:
        encoded: Tensor = self.backbone.clip_model.encode_text(text, normalize=normalize)
        return encoded


def _fix_encode_text(model: Any) -> Sequence[Swap]:
    """Return the exchange of ``encode_text``, or nothing if it was exchanged before."""
    backbone = model.backbone
    if isinstance(backbone.__dict__.get("encode_text"), _EncodeText):
        return ()
    return (Swap.attribute("backbone.encode_text", backbone, "encode_text", _EncodeText(backbone)),)


def _prepare(model: Any) -> None:
    """Set text embeddings: FC-CLIP encodes class names once, so their cost is not per image."""
    # one row for each template of each class
    size = sum(model.test_num_templates), model.backbone.dim_latent
    model.test_text_classifier = torch.ones(size, device=model.device)


@TARGETS.register("fc-clip")
def fc_clip() -> TableTarget:
    """Target for FC-CLIP on a ResNet of CLIP or a ConvNeXt; live models and checkpoints."""
    return TableTarget(
        name="fc-clip",
        framework="bytedance/fc-clip at 2b0bbe2 (detectron2, open_clip)",
        key_map=_RESNET,
        variants=(_CONVNEXT,),
        takes=("resnet", "convnext"),
        protects={
            "stage outputs": "the pixel decoder reads all four, at widths that the code sets",
            "stem": "its output has a width that the code sets",
            "attnpool": "its weights classify masks and are read one by one, at the dense width",
            "trunk.head": "it classifies masks with head, at the width of the text embeddings",
            "text tower": "it encodes the class names",
            "depth": "the framework runs the stages one by one",
        },
        trainable=("sem_seg_head.*", "void_embedding.*", f"{_CLIP}.visual.*"),
        script=script_for("bytedance/fc-clip"),
        compat_fixes=(_fix_encode_text,),
        inputs=image_inputs,
        prepares=_prepare,
        no_grad_methods=("backbone.extract_features",),
    )
