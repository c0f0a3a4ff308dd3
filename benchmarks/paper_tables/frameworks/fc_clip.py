"""FC-CLIP's way: the tower is frozen, masks are learnt on it, and it classifies them, too.

In the classes that were trained a learnt embedding of each mask says most, elsewhere the frozen
tower's own dense embeddings, pooled over the mask; they are mixed geometrically (Yu et al.,
NeurIPS 2023, equation 7, with its exponents 0.4 and 0.8).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from frameworks import mask_head

SEEN, UNSEEN = 0.4, 0.8
"""Exponent of the frozen tower's probability for classes that were trained, and others."""


class FcClip(nn.Module):
    """Mask proposals on a frozen tower, and mask pooling."""

    target, frozen = "generic", True

    def __init__(self, tower: Any, classes: int, seed: int) -> None:
        super().__init__()
        pixels, decoder, criterion = mask_head.parts(classes, seed)
        self.visual = tower.requires_grad_(False)
        self.pixel_decoder, self.predictor = pixels, decoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedder = mask_head.mlp(2 * 64)
            self.void_embedding = nn.Parameter(torch.randn(1, 512))
        self.scale = nn.Parameter(torch.tensor(math.log(20.0)))
        self.criterion = criterion
        self.register_buffer("trained", torch.zeros(0, 512), persistent=False)

    def train(self, mode: bool = True) -> FcClip:
        """The tower's norms stay as they are."""
        super().train(mode)
        self.visual.eval()
        return self

    def run(self, images: Tensor, text: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Masks and logits of every layer, and the tower's dense embeddings."""
        with torch.no_grad():
            stages = mask_head.pyramid(self.visual, images)
            dense = mask_head.embedded(self.visual, stages[-1])
        pixels = self.pixel_decoder(stages)
        out = self.predictor(pixels.multi_scale_features, pixels.mask_features)
        logits = []
        for state, mask in zip(
            out.intermediate_hidden_states, out.masks_queries_logits, strict=True
        ):
            pooled = _pool(pixels.mask_features, mask)
            both = torch.cat([state.transpose(0, 1), pooled], dim=-1)
            embedding = F.normalize(self.embedder(both), dim=-1)
            logits.append(mask_head.classified(embedding, text, self.void_embedding, self.scale))
        return list(out.masks_queries_logits), logits, dense

    def loss(self, images: Tensor, labels: Tensor, text: Tensor) -> Tensor:
        self.trained = text
        masks, logits, _ = self.run(images, text)
        return mask_head.weighted(self.criterion, masks, logits, labels[:, 1::2, 1::2])

    def predict(self, images: Tensor, text: Tensor) -> Tensor:
        masks, logits, dense = self.run(images, text)
        mask = masks[-1]
        fine = F.interpolate(dense, size=mask.shape[-2:], mode="bilinear", align_corners=False)
        out_of = 40.0 * F.normalize(_pool(fine, mask), dim=-1) @ text.T
        probability = logits[-1].softmax(-1)
        void = probability[..., -1:]
        learnt = logits[-1][..., :-1].softmax(-1)
        seen = (text @ self.trained.T > 0.999).any(1) if len(self.trained) else text.new_zeros(1)
        share = torch.where(seen.bool(), SEEN, UNSEEN)
        mixed = learnt.clamp_min(1e-8) ** (1 - share) * out_of.softmax(-1) ** share
        mixed = mixed / mixed.sum(-1, keepdim=True)
        return mask_head.segmented(mask, mixed * (1 - void))


def _pool(features: Tensor, masks: Tensor) -> Tensor:
    """The mean of features [B, C, h, w] over each mask [B, Q, h, w]: [B, Q, C]."""
    weight = (masks.detach() > 0).float()
    weight = weight / weight.sum((2, 3), keepdim=True).clamp_min(1.0)
    return torch.einsum("bqhw,bchw->bqc", weight, features)


def build(tower: Any, classes: int, seed: int) -> FcClip:
    return FcClip(tower, classes, seed)
