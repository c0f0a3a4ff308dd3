"""Masks and their embeddings: transformers' Mask2Former modules, without a backbone of theirs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POINTS = 512
"""Points of a mask that its loss looks at."""


def parts(classes: int, seed: int, width: int = 64) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Pixel decoder, transformer decoder and loss, of transformers' own initialisation.

    They are taken out of a whole model whose backbone has the stage widths of ours (Swin-T's are
    96, 192, 384, 768, and so are those of a ModifiedResNet of width 24); that backbone is dropped.
    """
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        SwinConfig,
    )

    swin = SwinConfig(
        embed_dim=96,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=width,
        mask_feature_size=width,
        hidden_dim=width,
        encoder_feedforward_dim=2 * width,
        dim_feedforward=4 * width,
        encoder_layers=2,
        decoder_layers=4,
        num_attention_heads=4,
        num_queries=24,
        train_num_points=POINTS,
        num_labels=classes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        whole = Mask2FormerForUniversalSegmentation(config)
    loss = whole.criterion
    return whole.model.pixel_level_module.decoder, whole.model.transformer_module, loss


def pyramid(tower: Any, images: Tensor) -> list[Tensor]:
    """What the four stages of a ModifiedResNet give."""
    x, found = tower.stem(images.contiguous(memory_format=torch.channels_last)), []
    for stage in (tower.layer1, tower.layer2, tower.layer3, tower.layer4):
        x = stage(x)
        found.append(x)
    return found


def embedded(tower: Any, stage: Tensor) -> Tensor:
    """Each position of the last stage on its own, in the space of the texts [B, 512, h, w]."""
    pool = tower.attnpool
    dense: Tensor = pool.c_proj(pool.v_proj(stage.movedim(1, -1))).movedim(-1, 1)
    return dense


def mlp(width: int, outputs: int = 512) -> nn.Sequential:
    """From a query to the space of the texts."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, outputs))


def classified(embedding: Tensor, text: Tensor, void: Tensor, scale: Tensor) -> Tensor:
    """Unit embeddings [B, Q, C] to logits [B, Q, K + 1]; the last one is no class at all."""
    everything = torch.cat([text, F.normalize(void, dim=-1)])
    return scale.exp().clamp(max=100.0) * embedding @ everything.T


def targets(labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Label maps [B, H, W] to each picture's masks [N, H, W] and their classes [N]."""
    masks, classes = [], []
    for label in labels:
        present = label.unique()
        present = present[present >= 0]
        masks.append((label[None] == present[:, None, None]).float())
        classes.append(present)
    return masks, classes


def weighted(criterion: Any, masks: list[Tensor], logits: list[Tensor], labels: Tensor) -> Tensor:
    """Mask2Former's loss of every layer's masks [B, Q, h, w] and logits [B, Q, K + 1]."""
    wanted, classes = targets(labels)
    keep = [i for i, c in enumerate(classes) if len(c)]
    if not keep:
        return torch.stack([m.sum() * 0 for m in masks]).sum()
    wanted, classes = [wanted[i] for i in keep], [classes[i] for i in keep]
    layers = [
        {"masks_queries_logits": m[keep], "class_queries_logits": c[keep]}
        for m, c in zip(masks, logits, strict=True)
    ]
    found = criterion(
        **layers[-1],
        mask_labels=wanted,
        class_labels=classes,
        auxiliary_predictions=layers[:-1],
    )
    total: Tensor = sum(
        value * next(w for key, w in criterion.weight_dict.items() if name.startswith(key))
        for name, value in found.items()
    )
    return total / len(layers)


def segmented(masks: Tensor, classes: Tensor) -> Tensor:
    """Masks [B, Q, h, w] and probabilities [B, Q, K] to class scores [B, K, h, w]."""
    return torch.einsum("bqk,bqhw->bkhw", classes, masks.sigmoid())
