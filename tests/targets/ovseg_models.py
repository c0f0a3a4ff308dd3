"""Builder of OVSeg by the framework's code and configuration, with random CLIP weights."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.targets.by_hand import lively_tower, load_pictures
from tests.targets.checkouts import checkout
from tests.targets.openai_states import fill, half_exact, whole_clip

CLASSES = ["person", "tree", "sky", "dining table"]
DATASET = "ovsprune_by_hand"
DEPTH = 3  # of the mask prompts


@dataclass(frozen=True)
class Shape:
    """Sizes of OVSeg and of its CLIP; regions have 224 x 224 pixels."""

    width: int
    depth: int
    patch: int
    outputs: int
    text_width: int
    text_depth: int
    queries: int
    real: bool = False

    size = 224

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


SMALL = Shape(256, 5, 32, 32, 64, 1, queries=5)
VIT_B = Shape(768, 12, 16, 512, 512, 12, queries=5, real=True)


def install(monkeypatch: pytest.MonkeyPatch) -> Path:
    """Import the checkout, with an empty module in place of wandb."""
    path = checkout(
        "ovseg", "detectron2", "timm", "pandas", "scipy", below=("", "third_party/CLIP")
    )
    if "wandb" not in sys.modules and importlib.util.find_spec("wandb") is None:
        monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    return path


def ovseg(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    shape: Shape,
    tower: Mapping[str, Tensor],
    *,
    seed: int = 0,
) -> Any:
    """Build OVSeg from its configuration for ViT-B/16, in evaluation mode.

    A smaller shape has a small Swin in the place of ResNet-101 (OVSeg has both) and fewer queries.

    Args:
        monkeypatch: For what it imports.
        folder: For the file of its CLIP, as its own finetuning saves it.
        shape: Of CLIP.
        tower: Canonical name to tensor.
        seed: Of everything but the tower.
    """
    path = install(monkeypatch)
    from detectron2.config import get_cfg
    from detectron2.data import MetadataCatalog
    from detectron2.modeling import build_model
    from detectron2.projects.deeplab import add_deeplab_config
    from open_vocab_seg import add_ovseg_config

    MetadataCatalog.get(DATASET).set(stuff_classes=CLASSES, ignore_label=255)
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_ovseg_config(cfg)
    cfg.merge_from_file(str(path / "configs" / "ovseg_R101c_vitB_bs32_120k.yaml"))
    cfg.MODEL.DEVICE, cfg.DATASETS.TRAIN = "cpu", (DATASET,)
    head, adapter, former = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.CLIP_ADAPTER, cfg.MODEL.MASK_FORMER
    head.NUM_CLASSES, head.EMBEDDING_DIM = len(CLASSES), shape.outputs
    former.NUM_OBJECT_QUERIES, adapter.MASK_PROMPT_DEPTH = shape.queries, DEPTH
    if not shape.real:
        cfg.MODEL.BACKBONE.NAME = "D2SwinTransformer"
        cfg.MODEL.SWIN.EMBED_DIM, cfg.MODEL.SWIN.DEPTHS = 16, [1, 1, 1, 1]
        cfg.MODEL.SWIN.NUM_HEADS = [1, 1, 2, 2]
        former.HIDDEN_DIM, former.DIM_FEEDFORWARD, former.DEC_LAYERS = 32, 64, 2
        head.CONVS_DIM = head.MASK_DIM = 32
    draw = torch.Generator().manual_seed(seed)
    state = whole_clip(tower, width=shape.text_width, depth=shape.text_depth)
    patches = (shape.size // shape.patch) ** 2
    state["visual.mask_embedding"] = torch.randn(DEPTH, patches, shape.width, generator=draw) * 0.5
    file = folder / "clip.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, file)
    adapter.CLIP_MODEL_NAME = str(file)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = build_model(cfg)
    fill(model, "clip_model", seed)
    return model.eval()


def pictures(model: Any) -> list[dict[str, Any]]:
    """Return one image in the form of OVSeg's data set: RGB from 0 to 255."""
    dtype = next(model.parameters()).dtype
    image = (load_pictures(1, 160)[0, :, :128] * 60 + 115).clamp(0, 255).to(dtype)
    return [{"image": image, "height": 128, "width": 160, "meta": {"dataset_name": DATASET}}]


def seen_by_clip(model: Any) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    """Return inputs and outputs of the image tower in one forward pass, and the final output."""
    seen: list[Any] = []
    visual = model.clip_adapter.clip_model.visual
    handle = visual.register_forward_hook(lambda module, given, out: seen.append((given, out)))
    try:
        seen.append(((), model(pictures(model))[0]["sem_seg"]))
    finally:
        handle.remove()
    return seen


def run(model: Any) -> dict[str, Tensor]:
    """Return the segmentation, and embeddings of masked regions and of images without a mask."""
    (given, regions), (_, segmented) = seen_by_clip(model)
    assert len(given) == 2 and given[1] is not None, "the regions have mask prompts"
    plain = model.clip_adapter.clip_model.visual(load_pictures(2, 224).to(regions))
    return {"sem_seg": segmented, "regions": regions, "plain": plain}


def loss(model: Any) -> Tensor:
    """Return the classification loss of masked regions, by which CLIP and prompts are finetuned.

    OVSeg's own training loss does not run CLIP on pictures.
    """
    adapter = model.clip_adapter
    dtype = adapter.non_object_embedding.dtype
    with torch.no_grad():  # texts are kept by the adapter, in the type of their first use
        if any(t.dtype != dtype for t in adapter.text_feature_buffer.values()):
            adapter.text_feature_buffer.clear()
        adapter.get_text_features(CLASSES)
    images = load_pictures(2, 224).to(dtype)
    masks = torch.zeros(2, 1, 224, 224, dtype=dtype)
    masks[0, :, 40:150, 30:200] = 1
    masks[1, :, :100] = 1
    features = adapter.get_image_features(images, masks)
    logits = adapter.get_sim_logits(adapter.get_text_features(CLASSES), features, 10)
    return torch.nn.functional.cross_entropy(logits, torch.tensor([1, 3]))


def losses_of_training(model: Any) -> dict[str, Tensor]:
    """Return OVSeg's losses for one image with two labelled masks."""
    from detectron2.structures import Instances

    given = pictures(model)
    image = given[0]["image"]
    instances = Instances((image.shape[1], image.shape[2]))
    instances.gt_classes = torch.tensor([0, 2])
    instances.gt_masks = torch.stack([image[0] > 128, image[1] <= 100])
    given[0]["instances"] = instances
    model.train()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            found: dict[str, Tensor] = model(given)
    finally:
        model.eval()
    return found
