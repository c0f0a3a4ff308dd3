"""A Mask2Former-style mask classifier: transformers' modules on CLIP's ResNet.

The names are those of OpenTrans' model (``backbone``, ``sem_seg_head``). Its tower is open_clip's
own and not OpenTrans' copy, whose activations have other names, so ovsprune's target ``generic``
attaches, which finds the tower by its structure.

A query is classified by the tower's own embedding of its mask, to which the query adds what it
learns. With classes learnt from the queries alone, 400 steps left the dense tower's row at 13.3 on
MSRC test, where no two masks can be told apart.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frameworks import mask_head


class Mask2Former(nn.Module):
    """Every query is a mask and an embedding, which is compared with the texts."""

    target, frozen = "generic", False

    def __init__(self, tower: Any, classes: int, seed: int) -> None:
        super().__init__()
        pixels, decoder, criterion = mask_head.parts(classes, seed)
        self.backbone = tower
        self.sem_seg_head = nn.ModuleDict({"pixel_decoder": pixels, "predictor": decoder})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.correction = mask_head.mlp(64)
            self.void_embedding = nn.Parameter(torch.randn(1, 512))
        for parameter in self.correction[-1].parameters():
            nn.init.zeros_(parameter)
        self.scale = nn.Parameter(torch.tensor(math.log(20.0)))
        self.criterion = criterion

    def run(self, images: Tensor, text: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Masks and logits of every layer."""
        stages = mask_head.pyramid(self.backbone, images)
        dense = mask_head.embedded(self.backbone, stages[-1])
        pixels = self.sem_seg_head["pixel_decoder"](stages)
        out = self.sem_seg_head["predictor"](pixels.multi_scale_features, pixels.mask_features)
        logits = []
        for state, mask in zip(
            out.intermediate_hidden_states, out.masks_queries_logits, strict=True
        ):
            inside = F.adaptive_avg_pool2d((mask.detach() > 0).float(), dense.shape[-2:])
            own = F.normalize(torch.einsum("bqhw,bchw->bqc", inside, dense), dim=-1)
            both = F.normalize(own + self.correction(state.transpose(0, 1)), dim=-1)
            logits.append(mask_head.classified(both, text, self.void_embedding, self.scale))
        return list(out.masks_queries_logits), logits

    def loss(self, images: Tensor, labels: Tensor, text: Tensor) -> Tensor:
        masks, logits = self.run(images, text)
        return mask_head.weighted(self.criterion, masks, logits, labels[:, 1::2, 1::2])

    def predict(self, images: Tensor, text: Tensor) -> Tensor:
        masks, logits = self.run(images, text)
        return mask_head.segmented(masks[-1], logits[-1].softmax(-1)[..., :-1])


def build(tower: Any, classes: int, seed: int) -> Mask2Former:
    return Mask2Former(tower, classes, seed)
