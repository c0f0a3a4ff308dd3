"""Small FC-CLIP and Mask2Former of their repositories, with random parameters.

A checkout is named by an environment variable, and nothing of it is here. Modules that the
frameworks import and that these tests do not reach have stand-ins.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.targets.by_hand import lively, load_pictures

CLASSES = ("person", "tree,trees", "sky")
DATASET = "ovsprune_three_classes"
SMALL_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
EMBED = 24
SMALL_HEAD = {
    "SEM_SEG_HEAD.NUM_CLASSES": len(CLASSES),
    "SEM_SEG_HEAD.CONVS_DIM": 64,  # two channels to a group of its norms: biases before them count
    "SEM_SEG_HEAD.MASK_DIM": 32,
    "SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MASK_FORMER.HIDDEN_DIM": 32,
    "MASK_FORMER.NUM_OBJECT_QUERIES": 8,
    "MASK_FORMER.NHEADS": 4,
    "MASK_FORMER.DIM_FEEDFORWARD": 64,
    "MASK_FORMER.DEC_LAYERS": 3,
    "MASK_FORMER.TRAIN_NUM_POINTS": 64,
    "MASK_FORMER.TEST.INSTANCE_ON": False,  # which wants more queries than there are here
    "MASK_FORMER.TEST.PANOPTIC_ON": False,
}


def checkout(variable: str) -> Path:
    """Return the repository that an environment variable names; skip the test without one."""
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} names no checkout")
    for name in ("detectron2", "fvcore"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    return Path(value).resolve(strict=True)


def _fail(*given: Any, **named: Any) -> Any:
    raise RuntimeError("a stand-in: nothing of this is compiled or installed here")


def _stand_in(name: str, **members: Any) -> None:
    """Add an empty module for an import, unless the real one is installed."""
    if name in sys.modules or ("." not in name and importlib.util.find_spec(name) is not None):
        return
    module = types.ModuleType(name)
    module.__dict__.update(members)
    sys.modules[name] = module


def _imported(repository: Path, package: str) -> Any:
    """Import a framework's package from the directory of its data."""
    # its attention has a way without the compiled operator, which it takes where that one fails
    _stand_in(
        "MultiScaleDeformableAttention", ms_deform_attn_forward=_fail, ms_deform_attn_backward=_fail
    )
    detectron2: Any = importlib.import_module("detectron2")
    if not hasattr(detectron2, "_C") and importlib.util.find_spec("detectron2._C") is None:
        detectron2._C = types.ModuleType("detectron2._C")  # from its sources, not compiled
    _stand_in("panopticapi", __path__=[])
    _stand_in("panopticapi.utils", rgb2id=_fail, get_traceback=lambda function: function)
    sys.path.insert(0, str(repository))
    try:
        with _there(repository):
            return importlib.import_module(package)
    finally:
        sys.path.remove(str(repository))


_OWN: dict[str, list[dict[str, Any]]] = {}


@contextlib.contextmanager
def _registered(package: str) -> Iterator[None]:
    """Register the parts of one framework in detectron2; frameworks share names."""
    from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY

    tables = [r._obj_map for r in (BACKBONE_REGISTRY, META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY)]
    before = [dict(table) for table in tables]
    for table, own in zip(tables, _OWN.get(package, ()), strict=False):
        table.update(own)
    try:
        yield
    finally:
        _OWN[package] = [dict(table) for table in tables]
        for table, old in zip(tables, before, strict=True):
            table.clear()
            table.update(old)


@contextlib.contextmanager
def _there(path: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def _config(add: Any, file: Path, options: dict[str, Any]) -> Any:
    from detectron2.config import get_cfg
    from detectron2.data import MetadataCatalog
    from detectron2.projects.deeplab import add_deeplab_config

    cfg = get_cfg()
    for extend in (add_deeplab_config, *add):
        extend(cfg)
    cfg.merge_from_file(str(file))
    for name, value in {"DEVICE": "cpu", "WEIGHTS": "", **options}.items():
        *path, leaf = name.split(".")
        node = cfg.MODEL
        for part in path:
            node = node[part]
        node[leaf] = value
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (DATASET,)
    MetadataCatalog.get(DATASET).set(
        stuff_classes=list(CLASSES),
        thing_classes=list(CLASSES[:1]),
        thing_dataset_id_to_contiguous_id={0: 0},
    )
    return cfg


@contextlib.contextmanager
def _small_clip(name: str, vision: dict[str, Any], embed: int) -> Iterator[None]:
    """Make open_clip's model ``name`` smaller inside the block."""
    from open_clip import factory

    before = factory._MODEL_CONFIGS.get(name)
    factory._MODEL_CONFIGS[name] = {
        "embed_dim": embed,
        "vision_cfg": vision,
        "text_cfg": SMALL_TEXT,
    }
    try:
        yield
    finally:
        del factory._MODEL_CONFIGS[name]
        if before is not None:
            factory._MODEL_CONFIGS[name] = before


CONVNEXT_NAME = "ovsprune_convnext_base"  # of which FC-CLIP knows the widths, by the name


@cache
def short_convnext() -> str:
    """Register timm's ConvNeXt-B with one block per stage; return its name."""
    import timm
    from timm.models.convnext import ConvNeXt

    def ovsprune_short_convnext(pretrained: bool = False, **options: Any) -> nn.Module:
        sizes: Any = {"depths": (1, 1, 1, 1), "dims": (128, 256, 512, 1024)}
        made: nn.Module = timm.models.build_model_with_cfg(
            ConvNeXt, "convnext_base", pretrained, **sizes, **options
        )
        return made

    ovsprune_short_convnext.__module__ = __name__
    timm.models.register_model(ovsprune_short_convnext)
    return "ovsprune_short_convnext"


RESNET_VISION = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 64, "patch_size": None}


def convnext_vision() -> dict[str, Any]:
    """Return the vision configuration of a small ConvNeXt, like convnext_large_d."""
    return {
        "timm_model_name": short_convnext(),
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "mlp",
        "timm_drop": 0.0,
        "timm_drop_path": 0.1,
        "image_size": 64,
    }


def fc_clip(kind: str, *, seed: int = 0, full: bool = False) -> Any:
    """Build the model of bytedance/fc-clip on CLIP's ResNet or a ConvNeXt.

    Args:
        kind: ``"resnet"`` or ``"convnext"``.
        seed: Of every value.
        full: RN50 or ConvNeXt-L, and the heads, in their real sizes.
    """
    repository = checkout("OVSPRUNE_FC_CLIP_REPO")
    with _registered("fcclip"):
        return _fc_clip(repository, kind, seed, full)


def _fc_clip(repository: Path, kind: str, seed: int, full: bool) -> Any:
    package = _imported(repository, "fcclip")
    folder = repository / "configs/coco/panoptic-segmentation/fcclip"
    name = {"resnet": "RN50", "convnext": "convnext_large_d_320" if full else CONVNEXT_NAME}[kind]
    file = folder / f"fcclip_convnext_large_eval_ade20k{'_r50' if kind == 'resnet' else ''}.yaml"
    options: dict[str, Any] = {} if full else dict(SMALL_HEAD)
    options |= {
        "SEM_SEG_HEAD.NUM_CLASSES": len(CLASSES),
        "FC_CLIP.CLIP_MODEL_NAME": name,
        "FC_CLIP.CLIP_PRETRAINED_WEIGHTS": "",
    }
    if not full:
        options["FC_CLIP.EMBED_DIM"] = EMBED
    if not file.is_file():
        file = next(folder.glob("*r50*ade20k*.yaml" if kind == "resnet" else "*large*ade20k.yaml"))
    cfg = _config((package.add_maskformer2_config, package.add_fcclip_config), file, options)
    vision = RESNET_VISION if kind == "resnet" else convnext_vision()
    torch.manual_seed(seed)
    with contextlib.nullcontext() if full else _small_clip(name, vision, EMBED):
        return lively_whole(_built(cfg), seed)


def mask2former(kind: str, *, seed: int = 0, full: bool = False) -> Any:
    """Build Mask2Former by the framework's code.

    Args:
        kind: ``"clip"`` (OpenTrans's CLIPResNetWithAttention), ``"unpooled"`` (the same without its
            attention pool), or ``"plain"`` (detectron2's ResNet).
        seed: Of every value.
        full: In real sizes.
    """
    repository = checkout("OVSPRUNE_MASK2FORMER_REPO")
    with _registered("mask2former"):
        return _mask2former(repository, kind, seed, full)


def _mask2former(repository: Path, kind: str, seed: int, full: bool) -> Any:
    package = _imported(repository, "mask2former")
    file = repository / "configs/coco/panoptic-segmentation/maskformer2_R50_bs16_50ep.yaml"
    options: dict[str, Any] = {} if full else dict(SMALL_HEAD)
    options["SEM_SEG_HEAD.NUM_CLASSES"] = len(CLASSES)
    if kind != "plain":
        _clip_backbone(checkout("OVSPRUNE_OPENTRANS_REPO"))
        options |= {
            "BACKBONE.NAME": "CLIPResNetWithAttention",
            "RESNETS.LAYERS": [3, 4, 6, 3] if full else [1, 1, 1, 1],
            "RESNETS.OUTPUT_DIM": 1024 if full else EMBED,
            "RESNETS.INPUT_RESOLUTION": 512 if full else 96,
            "RESNETS.WIDTH": 64,
            "RESNETS.PRETRAINED": None,
        }
    cfg = _config((package.add_maskformer2_config,), file, options)
    torch.manual_seed(seed)
    model = _built(cfg)
    if kind == "plain" and not full:  # its depths are those of published networks
        for stage in ("res2", "res3", "res4", "res5"):
            blocks = getattr(model.backbone, stage)
            del blocks[1:]
    if kind == "unpooled":
        model.backbone.remove_attenpool()
    return lively_whole(model, seed)


@cache
def _clip_backbone(repository: Path) -> None:
    """Register the CLIP backbones of OpenTrans in detectron2."""
    _stand_in("loralib")
    layers: Any = importlib.import_module("timm.models.layers")
    layers.drop = getattr(layers, "drop", layers.drop_path)  # imported by a name that timm moved
    file = repository / "mask2former" / "clip_models.py"
    spec = importlib.util.spec_from_file_location("opentrans_clip_models", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


def _built(cfg: Any) -> Any:
    from detectron2.modeling import build_model

    return build_model(cfg).eval()


@torch.no_grad()
def lively_whole(model: Any, seed: int) -> Any:
    """Draw values for statistics and for parameters that start at a constant."""
    draw = torch.Generator().manual_seed(seed)
    backbone = model.backbone
    lively(backbone.clip_model.visual if hasattr(backbone, "clip_model") else backbone, seed)
    for name, tensor in model.state_dict().items():
        done = ".visual." in name if "clip_model." in name else name.startswith("backbone.")
        if done or not tensor.is_floating_point() or name.startswith("criterion."):
            continue
        if tensor.ndim <= 1:
            tensor.add_(torch.randn(tensor.shape, generator=draw) * 0.1)
        else:
            spread = 0.1 if tensor.std() == 0 else float(tensor.std())
            tensor.add_(torch.randn(tensor.shape, generator=draw) * 0.3 * spread)
    return model.eval()


def batch(side: int = 64, count: int = 2, *, targets: bool = False) -> list[dict[str, Any]]:
    """Return images in detectron2's form; with ``targets``, random instances of each."""
    pictures = (load_pictures(count, side) * 60 + 120).clamp(0, 255)
    made: list[dict[str, Any]] = [
        {"image": image, "height": side, "width": side} for image in pictures
    ]
    if targets:
        from detectron2.structures import Instances

        for i, entry in enumerate(made):
            found = Instances((side, side))
            found.gt_classes = torch.tensor([i % 3, 2])
            masks = torch.zeros(2, side, side, dtype=torch.bool)
            masks[0, : side // 2, i * 8 :], masks[1, side // 2 :, : side - 8] = True, True
            found.gt_masks = masks
            entry["instances"] = found
    return made


@torch.no_grad()
def run(model: Any, side: int = 64) -> dict[str, Tensor]:
    """Return the masks and logits of the framework's head, and the final segmentation."""
    seen: dict[str, Tensor] = {}

    def look(module: nn.Module, given: Any, found: Any) -> None:
        seen.update({name: found[name].clone() for name in ("pred_logits", "pred_masks")})

    handle = model.sem_seg_head.register_forward_hook(look)
    try:
        pictures = model(batch(side))
    finally:
        handle.remove()
    return {**seen, "sem_seg": torch.stack([picture["sem_seg"] for picture in pictures])}
