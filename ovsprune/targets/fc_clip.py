"""FC-CLIP of bytedance/fc-clip (detectron2), on CLIP's residual networks and on ConvNeXts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ovsprune.slim.attach import Swap
from ovsprune.targets import TARGETS
from ovsprune.targets.detectron2_rules import one_picture, script_for
from ovsprune.targets.framework import TableTarget
from ovsprune.targets.key_map import KeyMap
from ovsprune.targets.layout import clip_text

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
class _OwnText:
    """open_clip's own ``encode_text`` in the place of FC-CLIP's, which is the one of its time.

    That one hands the text transformer [L, N, E]; open_clip reads [N, L, E] after 2.24. An object
    and no function, so that a copied or pickled model gets one of its own.
    """

    backbone: Any

    def __call__(self, text: Tensor, normalize: bool = False) -> Tensor:
        encoded: Tensor = self.backbone.clip_model.encode_text(text, normalize=normalize)
        return encoded


def _bridge_text(model: Any) -> Sequence[Swap]:
    backbone = model.backbone
    if isinstance(backbone.__dict__.get("encode_text"), _OwnText):
        return ()
    new = _OwnText(backbone)
    return (Swap.attribute("backbone.encode_text", backbone, "encode_text", new),)


def _prepare(model: Any) -> None:
    """The names of the classes are encoded once for all pictures, so they do not count."""
    size = sum(model.test_num_templates), model.backbone.dim_latent
    model.test_text_classifier = torch.ones(size, device=model.device)


@TARGETS.register("fc-clip")
def fc_clip() -> TableTarget:
    """FC-CLIP of bytedance/fc-clip on CLIP's RN50 and its kin, or ConvNeXt; live and on disk."""
    return TableTarget(
        name="fc-clip",
        framework="bytedance/fc-clip at 2b0bbe2 (detectron2, open_clip)",
        places=_RESNET,
        builds=(_CONVNEXT,),
        takes=("resnet", "convnext"),
        protects={
            "stage outputs": "the pixel decoder reads all four, at widths that the code names",
            "stem": "its output has a width that the code names",
            "attnpool": "its weights classify the masks, read one by one, with the dense heads",
            "trunk.head": "with head it classifies the masks, by text embeddings' width",
            "text tower": "the names of the classes are encoded with it",
            "depth": "the stages are run one by one",
        },
        trainable=("sem_seg_head.*", "void_embedding.*", f"{_CLIP}.visual.*"),
        script=script_for("bytedance/fc-clip"),
        compat_fixes=(_bridge_text,),
        inputs=one_picture,
        prepares=_prepare,
        no_grad_methods=("backbone.extract_features",),
    )
