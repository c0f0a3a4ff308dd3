"""Builder of CAT-Seg by the framework's code and configuration, with random CLIP weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.targets.by_hand import lively_tower, load_pictures
from tests.targets.checkouts import checkout
from tests.targets.openai_states import Archive, fill, half_exact, whole_clip

CLASSES = ["person", "tree", "sky, cloud", "dining table"]


@dataclass(frozen=True)
class Shape:
    """Sizes of CLIP in CAT-Seg; ``side`` is the input size of the image tower, 24 patches."""

    width: int
    depth: int
    patch: int
    size: int
    outputs: int
    text_width: int
    text_depth: int
    side: int

    @property
    def heads(self) -> int:
        return self.width // 64

    def tower(self, seed: int = 0) -> dict[str, Tensor]:
        tower = lively_tower(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            patch=self.patch,
            size=self.size,
            outputs=self.outputs,
            mlp=4 * self.width,
            seed=seed,
        )
        return half_exact(tower)


SMALL = Shape(256, 9, 4, 56, 32, 64, 1, 96)
VIT_B = Shape(768, 12, 16, 224, 512, 512, 12, 384)


def install(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Import the checkout; its tokens of texts stay on the CPU if there is no GPU."""
    path = checkout("cat-seg", "detectron2", "einops", "timm", "pycocotools")
    if not torch.cuda.is_available():
        monkeypatch.setattr(Tensor, "cuda", lambda self, *rest, **named: self)
    return path


def cat_seg(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    shape: Shape,
    tower: Mapping[str, Tensor],
    *,
    finetune: str = "attention",
    prompts: tuple[int, int] = (0, 0),
    seed: int = 0,
) -> Any:
    """Build CATSeg from its configuration for ViT-B/16, in evaluation mode.

    The framework writes the widths of ViT-B/16 into its upsampling layers and the size of the
    tower's pictures; for a smaller shape they are exchanged after it was built.

    Args:
        monkeypatch: Lets the framework's ``clip.load`` find a drawn CLIP.
        folder: For its lists of classes.
        shape: Of CLIP.
        tower: Canonical name to tensor.
        finetune: What it trains of CLIP, as its configuration says.
        prompts: Depth and length of its visual prompts.
        seed: Of everything but the tower.
    """
    path = install(monkeypatch)
    from cat_seg import add_cat_seg_config
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    from detectron2.projects.deeplab import add_deeplab_config

    classes = folder / "classes.json"
    classes.write_text(json.dumps(CLASSES))
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_cat_seg_config(cfg)
    cfg.merge_from_file(str(path / "configs" / "vitb_384.yaml"))
    head = cfg.MODEL.SEM_SEG_HEAD
    cfg.MODEL.DEVICE = "cpu"
    head.TRAIN_CLASS_JSON = head.TEST_CLASS_JSON = str(classes)
    head.NUM_CLASSES, head.CLIP_FINETUNE = len(CLASSES), finetune
    head.PROMPT_DEPTH, head.PROMPT_LENGTH = prompts
    head.TEXT_GUIDANCE_DIM = head.APPEARANCE_GUIDANCE_DIM = shape.outputs
    if shape != VIT_B:
        head.HIDDEN_DIMS, head.NUM_LAYERS = 64, 1
        head.TEXT_GUIDANCE_PROJ_DIM = head.APPEARANCE_GUIDANCE_PROJ_DIM = 16
    state = whole_clip(tower, width=shape.text_width, depth=shape.text_depth)
    monkeypatch.setattr("cat_seg.third_party.clip._download", lambda url, *rest: url)
    monkeypatch.setattr(torch.jit, "load", lambda *rest, **named: Archive(state, shape.size))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = build_model(cfg)
        if shape != VIT_B:
            model.clip_resolution = (shape.side, shape.side)
            model.upsample1 = nn.ConvTranspose2d(shape.width, 256, 2, 2)
            model.upsample2 = nn.ConvTranspose2d(shape.width, 128, 4, 4)
    fill(model, "clip_model", seed)
    return model.eval()


def pictures(
    model: Any, count: int = 1, height: int = 120, width: int = 150
) -> list[dict[str, Any]]:
    """Return images in the form of CAT-Seg's data set: RGB from 0 to 255, of any size."""
    dtype = next(model.parameters()).dtype
    square = load_pictures(count, max(height, width)) * 60 + 115
    return [
        {
            "image": each[:, :height, :width].to(dtype).clamp(0, 255),
            "height": height,
            "width": width,
        }
        for each in square
    ]


def run(model: Any) -> dict[str, Tensor]:
    """Return the segmentation, dense and pooled embeddings, and the two hooked streams."""
    seen: list[Tensor] = []
    visual = model.sem_seg_head.predictor.clip_model.visual
    handle = visual.register_forward_hook(lambda module, given, out: seen.append(out))
    size = visual.input_resolution
    try:
        segmented = model(pictures(model))[0]["sem_seg"]
        streams = list(model.layers)
        model.sem_seg_head.predictor.clip_model.encode_image(load_pictures(1, size).to(segmented))
    finally:
        handle.remove()
        model.layers = []
    return {
        "sem_seg": segmented,
        "dense": seen[0],
        "pooled": seen[1],
        **{f"stream {i}": stream for i, stream in zip(model.layer_indexes, streams, strict=True)},
    }


def loss(model: Any) -> Tensor:
    """Return the framework's training loss on two images, with some pixels ignored."""
    given = pictures(model, 2, 96, 96)
    for each in given:
        labels = (each["image"].mean(0) / 64).long().clamp(0, len(CLASSES) - 1)
        labels[:10] = 255
        each["sem_seg"] = labels
    model.train()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            found: Tensor = model(given)["loss_sem_seg"]
    finally:
        model.eval()
        model.layers = []
    return found
