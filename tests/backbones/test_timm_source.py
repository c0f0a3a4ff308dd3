"""Models of timm (``timm:NAME``) from the cache and from files, and their checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

import ovsprune
from ovsprune import backbones
from ovsprune.core.errors import UnknownNameError, WeightsError
from ovsprune.jobs.prune import prune

_CFG = {"input_size": (3, 48, 48), "first_conv": "patch_embed.proj", "classifier": "head",
        "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.3), "interpolation": "bilinear",
        "crop_mode": "center"}  # fmt: skip

default_cfgs = generate_default_cfgs(
    {
        "ovsprune_small.words": {**_CFG, "hf_hub_id": "someone/words", "num_classes": 24},
        "ovsprune_small.classes": {**_CFG, "hf_hub_id": "someone/classes", "num_classes": 1000},
        "ovsprune_small.jax": {**_CFG, "hf_hub_id": "someone/jax", "custom_load": True},
        "ovsprune_small.squashed": {
            **_CFG,
            "hf_hub_id": "someone/squashed",
            "num_classes": 0,
            "crop_mode": "squash",
        },
    }
)


@register_model
def ovsprune_small(pretrained: bool = False, **options: Any) -> nn.Module:
    """Build a CLIP-like ViT of three blocks."""
    from timm.models import vision_transformer

    given = {"img_size": 48, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4,
             "mlp_ratio": 2.0, "pre_norm": True, "norm_layer": nn.LayerNorm,
             "act_layer": "quick_gelu", **options}  # fmt: skip
    return vision_transformer._create_vision_transformer(  # type: ignore[no-any-return]
        "ovsprune_small", pretrained, **given
    )


def put(root: Path, repository: str, state: dict[str, Tensor]) -> None:
    """Store weights in the layout of the hub's client."""
    directory = root / f"models--{repository.replace('/', '--')}"
    snapshot = directory / "snapshots" / ("0123456789abcdef" * 3)[:40]
    snapshot.mkdir(parents=True)
    (directory / "refs").mkdir()
    (directory / "refs" / "main").write_text(snapshot.name)
    save_file(state, snapshot / "model.safetensors")


def timm_model(classes: int) -> Any:
    """Build timm's model with random weights."""
    torch.manual_seed(classes)
    model = timm.create_model("ovsprune_small", num_classes=classes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter) + (parameter == 1))
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def test_tag_selects_weights_and_preprocessing(root: Path, images: Tensor) -> None:
    model = timm_model(24)
    put(root, "someone/words", model.state_dict())
    backbone = backbones.load_backbone("timm:ovsprune_small.words")
    assert (backbone.name, backbone.pretrained) == ("timm:ovsprune_small", "words")
    assert backbone.trained and not backbone.has_text and not backbone.notes
    assert backbone.preprocess.size == (48, 48) and backbone.preprocess.mean == (0.4, 0.5, 0.6)
    assert backbone.preprocess.interpolation == "bilinear"
    torch.testing.assert_close(backbone.pooled(images), model(images))
    assert backbone.dense(images).shape == (2, 24, 6, 6)


def test_default_tag_and_other_tags(root: Path) -> None:
    put(root, "someone/words", timm_model(24).state_dict())
    put(root, "someone/classes", timm_model(1000).state_dict())
    assert backbones.load_backbone("timm:ovsprune_small").pretrained == "words"
    for other in ("timm:ovsprune_small", "timm:ovsprune_small.words"):
        assert backbones.load_backbone(other, pretrained="classes").pretrained == "classes"
    untrained = backbones.load_backbone("timm:ovsprune_small.squashed", pretrained="none")
    assert untrained.preprocess.resize_mode == "squash"
    assert untrained.pretrained is None and not untrained.trained


def test_classifier_is_removed(root: Path, images: Tensor) -> None:
    model = timm_model(1000)
    put(root, "someone/classes", model.state_dict())
    found = backbones.load_backbone("timm:ovsprune_small.classes").pooled(images)
    model.reset_classifier(0)
    torch.testing.assert_close(found, model(images))
    assert found.shape == (2, 64)


@pytest.mark.parametrize("before", ["", "backbone.", "module.visual.trunk."])
def test_file_with_a_prefix(tmp_path: Path, images: Tensor, before: str) -> None:
    model = timm_model(24)
    file = tmp_path / "weights.safetensors"
    save_file({before + k: v for k, v in model.state_dict().items()}, file)
    backbone = backbones.load_backbone("timm:ovsprune_small.words", pretrained=str(file))
    assert backbone.pretrained == "weights.safetensors"
    assert backbone.preprocess.mean == (0.4, 0.5, 0.6)
    torch.testing.assert_close(backbone.pooled(images), model(images))


def test_file_in_the_format_of_openai_is_converted_by_timm(tmp_path: Path, images: Tensor) -> None:
    from open_clip.transformer import QuickGELU, VisionTransformer

    torch.manual_seed(3)
    clip = VisionTransformer(48, 8, 64, 3, 4, 2.0, output_dim=24, act_layer=QuickGELU).eval()
    file = tmp_path / "openai.pt"
    torch.save({f"visual.{k}": v for k, v in clip.state_dict().items()}, file)
    backbone = backbones.load_backbone("timm:ovsprune_small.words", pretrained=str(file))
    with torch.no_grad():
        expected = clip(images)
    torch.testing.assert_close(backbone.pooled(images), expected, atol=1e-5, rtol=1e-4)


def test_misfit_lists_the_keys(tmp_path: Path) -> None:
    state = timm_model(24).state_dict()
    del state["blocks.2.mlp.fc1.weight"]
    file = tmp_path / "short.safetensors"
    save_file(state, file)
    with pytest.raises(WeightsError, match=r"1 missing \(visual.trunk.blocks.2.mlp.fc1.weight\)"):
        backbones.load_backbone("timm:ovsprune_small.words", pretrained=str(file))
    save_file(timm_model(0).state_dict(), file)  # an embedding's head is not drawn at random
    with pytest.raises(WeightsError, match=r"2 missing \(visual.trunk.head.weight"):
        backbones.load_backbone("timm:ovsprune_small.words", pretrained=str(file))


def test_unknown_names_tags_and_missing_weights(root: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'ovsprune_small'"):
        backbones.load_backbone("timm:ovsprune_smal")
    with pytest.raises(UnknownNameError, match="Did you mean 'timm:ovsprune_small.words'"):
        backbones.load_backbone("ovsprune_small.words")
    with pytest.raises(WeightsError, match="Tags: classes, jax, squashed, words"):
        backbones.load_backbone("timm:ovsprune_small.laion")
    with pytest.raises(WeightsError, match="Tags: classes, jax, squashed, words"):
        backbones.load_backbone("timm:ovsprune_small", pretrained="laion")
    with pytest.raises(WeightsError, match="not published"):
        backbones.load_backbone("timm:ovsprune_small.jax")
    with pytest.raises(WeightsError, match=r"'words' of timm:ovsprune_small .*HF_HOME"):
        backbones.load_backbone("timm:ovsprune_small.words")
    for name in ("timm:resnet18", "timm:hiera_tiny_224", "timm:eva02_tiny_patch14_224"):
        with pytest.raises(WeightsError, match="none of the families"):
            backbones.load_backbone(name, pretrained="none")


def test_pruned_model_loads_and_attaches_to_a_model_of_timm(
    tmp_path: Path, root: Path, images: Tensor
) -> None:
    model = timm_model(24)
    put(root, "someone/words", model.state_dict())
    directory = tmp_path / "slim"
    prune("timm:ovsprune_small.words", 0.4, samples=8, output=directory)
    config = json.loads((directory / "config.json").read_text())
    assert config["base"]["model"] == "timm:ovsprune_small"
    assert config["base"]["pretrained"] == "words"
    assert all(key.startswith("visual.") for key in load_file(directory / "model.safetensors"))

    slim = ovsprune.load(directory)
    with torch.no_grad():
        expected = slim(images)
    checkpoint = ovsprune.read(directory)
    with ovsprune.apply(model, checkpoint, prefix_map={"trunk": ""}), torch.no_grad():
        torch.testing.assert_close(model(images), expected)
    again = prune(str(directory), 0.2, samples=8, output=tmp_path / "again")
    assert again.spec.slim.macs < checkpoint.spec.slim.macs
    with pytest.raises(ovsprune.OvspruneError, match="no text tower"):
        ovsprune.load_open_clip(directory)
