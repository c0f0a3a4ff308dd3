"""Builder of MendelXu/SAN from its configurations, small or in full size."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VARIABLE = "OVSPRUNE_SAN_REPO"
WORDS = ["person", "tree", "sky"]

# ViT of 4 blocks with a text tower of 2; SAN's split, fusion and heads to fit it.
SMALL = {"width": 64, "depth": 4, "heads": 4, "patch": 16, "size": 64, "outputs": 32}
SMALL_MLP = 256
SMALL_OPTIONS: list[Any] = [
    *("MODEL.SAN.FEATURE_LAST_LAYER_IDX", 2),
    *("MODEL.SIDE_ADAPTER.FUSION_MAP", ["0->0", "1->1", "2->2"]),
    *("MODEL.SIDE_ADAPTER.ATTN_BIAS.NUM_HEADS", 4),
    *("MODEL.SIDE_ADAPTER.NUM_QUERIES", 12),
    *("MODEL.SIDE_ADAPTER.IMAGE_SIZE", 128),
    *("MODEL.SAN.TRAIN_NUM_POINTS", 64),
]
LARGE = "san_clip_vit_large_res4_coco.yaml"
BASE = "san_clip_vit_res4_coco.yaml"


def repository() -> Path:
    """Return SAN's checkout; skip the test without it or detectron2."""
    if not os.environ.get(VARIABLE):
        pytest.skip(f"{VARIABLE} names no checkout of MendelXu/SAN")
    if importlib.util.find_spec("detectron2") is None:
        pytest.skip("detectron2 is not installed")
    return Path(os.environ[VARIABLE])


@contextmanager
def _importable(path: Path) -> Iterator[None]:
    """Make SAN importable, with an empty module in place of a missing experiment tracker."""
    if "wandb" not in sys.modules and importlib.util.find_spec("wandb") is None:
        tracker = ModuleType("wandb")
        tracker.init = tracker.log = tracker.finish = lambda *a, **k: None  # type: ignore[attr-defined]
        sys.modules["wandb"] = tracker
    sys.path.insert(0, str(path))
    try:
        yield
    finally:
        sys.path.remove(str(path))


def small_clip(directory: Path) -> None:
    """Register ``small-vit`` in open_clip."""
    import open_clip

    document = {
        "embed_dim": SMALL["outputs"],
        "vision_cfg": {
            "image_size": SMALL["size"],
            "layers": SMALL["depth"],
            "width": SMALL["width"],
            "head_width": SMALL["width"] // SMALL["heads"],
            "patch_size": SMALL["patch"],
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 2,
        },
        "quick_gelu": True,
    }
    (directory / "small-vit.json").write_text(json.dumps(document))
    open_clip.add_model_config(directory)


def config(name: str, clip: str, options: list[Any]) -> Any:
    """Return SAN's configuration with another CLIP, without weights, on the CPU."""
    with _importable(repository()):
        from detectron2.config import get_cfg
        from detectron2.projects.deeplab import add_deeplab_config

        san = importlib.import_module("san")
    cfg = get_cfg()
    add_deeplab_config(cfg)
    san.add_san_config(cfg)
    cfg.merge_from_file(str(repository() / "configs" / name), allow_unsafe=True)
    given = {"CLIP_MODEL_NAME": clip, "CLIP_PRETRAINED_NAME": "", "NUM_CLASSES": len(WORDS)}
    cfg.merge_from_list(["MODEL.DEVICE", "cpu"])
    for key, value in given.items():
        cfg.merge_from_list([f"MODEL.SAN.{key}", value])
    cfg.merge_from_list(options)
    return cfg


def build(cfg: Any, seed: int = 0) -> Any:
    """Build SAN by detectron2, with a strong attention bias that differs between heads."""
    from detectron2.modeling import build_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = build_model(cfg)
        model.ov_classifier.templates = model.ov_classifier.templates[:1]  # of fourteen, for time
        sharpen(model)
    model.ov_classifier.cache.clear()  # text embeddings of weights that may be replaced
    model.eval()
    assert all(bool(torch.isfinite(t).all()) for t in model.parameters())
    return model


@torch.no_grad()
def sharpen(model: Any, std: float = 2.0) -> None:
    """Scale the initial bias, which is so flat that a wrong order of heads changes nothing."""
    decoder = model.side_adapter_network.mask_decoder
    last = decoder.attn_mlp.layers[-1]
    nn.init.orthogonal_(last.weight.view(last.weight.shape[0], -1))
    last.bias.zero_()
    decoder.bias_scaling.bias.zero_()
    bias = run(model, pictures(1, 128))["bias"].transpose(0, 1).flatten(1)
    rows = (bias.std(dim=1)).repeat_interleave(last.weight.shape[0] // len(bias))
    last.weight.mul_(std / rows[:, None, None, None])


def pictures(count: int, side: int) -> Tensor:
    """Return images in the form of SAN's loader: float from 0 to 255, [count, 3, side, side]."""
    from ovsprune.core.records import Preprocess
    from tests.targets.by_hand import load_pictures

    mean = torch.tensor(Preprocess((side, side)).mean)[:, None, None]
    std = torch.tensor(Preprocess((side, side)).std)[:, None, None]
    return (load_pictures(count, side) * std + mean) * 255


def example(images: Tensor) -> list[dict[str, Any]]:
    """Return the input of SAN's forward pass."""
    side = images.shape[-1]
    return [{"image": x, "vocabulary": WORDS, "height": side, "width": side} for x in images]


@torch.no_grad()
def run(model: Any, images: Tensor) -> dict[str, Tensor]:
    """Run SAN on images; return the segmentation and intermediate outputs."""
    model.eval()
    found: dict[str, Tensor] = {}

    def keep(name: str, pick: Any) -> Any:
        return lambda module, given, made: found.__setitem__(name, pick(made))

    hooks = [
        model.clip_rec_head.register_forward_hook(keep("embeddings", lambda x: x)),
        model.side_adapter_network.register_forward_hook(keep("masks", lambda x: x[0][-1])),
        model.side_adapter_network.mask_decoder.register_forward_hook(
            keep("bias", lambda x: x[1][-1])
        ),
    ]
    try:
        made = model(example(images))
    finally:
        for hook in hooks:
            hook.remove()
    found["segmentation"] = torch.stack([x["sem_seg"] for x in made])
    return found


def train_input(images: Tensor) -> list[dict[str, Any]]:
    """Return the input of SAN's forward pass in training, two regions per image."""
    from detectron2.structures import BitMasks, Instances

    batch = []
    for image in images:
        side = image.shape[-1]
        bright = image.mean(0) > image.mean()
        instances = Instances((side, side))
        instances.gt_classes = torch.tensor([0, 2])
        instances.gt_masks = BitMasks(torch.stack([bright, ~bright])).tensor
        batch.append({"image": image, "instances": instances, "vocabulary": WORDS})
    return batch
