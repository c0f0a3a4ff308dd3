"""mmsegmentation's SAN, small, around ``photo``; its tower trains, which SAN's own does not."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POINTS = 512
"""Points of a mask that its loss looks at; mmsegmentation's own configuration has 12,544."""
SIDE = 256
"""Of the pictures that the side adapter sees: SAN shows it twice the tower's size, which would be
384 here, and is spared for time."""


class San(nn.Module):
    """The framework's model, run by its own head and its own losses."""

    target, frozen = "mmseg-san", False

    def __init__(self, tower: Any, classes: int, seed: int) -> None:
        super().__init__()
        from ovsprune.targets.mmseg_build import SanShape, build_san, load_tower

        state = tower.state_dict()
        heads = tower.transformer.resblocks[0].attn.num_heads
        side = 16 * int(len(state["positional_embedding"]) ** 0.5)
        shape = SanShape.small(state, heads=heads, size=side, activation="gelu")
        self.names = [str(i) for i in range(classes)]
        self.model: Any = build_san(self.names, shape, seed=seed)
        load_tower(self.model, state)
        # Its text tower is never run: the texts are given.
        self.model.text_encoder.logit_scale.data.fill_(4.0)
        for name, parameter in self.model.named_parameters():
            bare = not name.startswith("text_encoder") or name.endswith("bg_embed")
            parameter.requires_grad_(bare)
        head = self.model.decode_head
        # One number, drawn at random: near 0 it keeps the side adapter from guiding the tower.
        scaling = head.side_adapter_network.mask_decoder.bias_scaling
        nn.init.ones_(scaling.weight)
        nn.init.zeros_(scaling.bias)
        head.train_cfg.num_points = head.match_masks.num_points = POINTS

    @property
    def holder(self) -> nn.Module:
        """What the target knows."""
        module: nn.Module = self.model
        return module

    def _inputs(self, images: Tensor, text: Tensor) -> list[Any]:
        large = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        encoder = self.model.text_encoder
        everything = F.normalize(torch.cat([text, encoder.bg_embed]), dim=-1)
        classes = encoder.logit_scale.exp() * everything
        return [large, self.model.image_encoder(images), classes]

    def loss(self, images: Tensor, labels: Tensor, text: Tensor) -> Tensor:
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        void = self.model.decode_head.ignore_index
        samples = [
            SegDataSample(
                gt_sem_seg=PixelData(data=label.masked_fill(label < 0, void)[None]),
                metainfo={"img_shape": tuple(label.shape)},
            )
            for label in labels[:, 1::2, 1::2]
        ]
        head = self.model.decode_head
        found = head.loss(self._inputs(images, text), samples, head.train_cfg)
        total: Tensor = sum(value for name, value in found.items() if "loss" in name)
        return total

    def predict(self, images: Tensor, text: Tensor) -> Tensor:
        masks, logits = self.model.decode_head(self._inputs(images, text), [])
        classes = logits[-1].softmax(-1)[..., :-1]
        return torch.einsum("bqk,bqhw->bkhw", classes, masks[-1].sigmoid())


def build(tower: Any, classes: int, seed: int) -> San:
    return San(tower, classes, seed)
