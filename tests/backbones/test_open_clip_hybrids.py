"""ViTamin and Swin in open_clip's TimmModel: names, blocks, dense outputs, checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

import ovsprune
from ovsprune import backbones
from ovsprune.backbones import FAMILIES
from ovsprune.calibration.activation_cache import ActivationCache, run_block, run_stem
from ovsprune.core.errors import TargetError
from ovsprune.core.protocols import Backbone
from ovsprune.jobs.prune import prune
from ovsprune.slim.norms import ZeroPaddedLayerNorm
from tests.contracts.conftest import (
    of_timm,
    open_clip_swin,
    open_clip_timm_vit,
    open_clip_vitamin,
    prepared,
)

VIT, SWIN = FAMILIES.get("open_clip-timm-vit"), FAMILIES.get("open_clip-swin")
BACKBONE = "trunk.patch_embed.backbone"
QUICK: dict[str, Any] = {"samples": 6, "batch_size": 4, "probe": 2}


def test_names_of_open_clip_are_listed() -> None:
    listed = {name for name in open_clip.list_models() if name.startswith("ViTamin")}
    assert len(listed) == 15 and listed <= set(VIT.names())
    assert SWIN.names() == ("swin_base_patch4_window7_224",)


@pytest.mark.parametrize(
    ("name", "options", "family"),
    [
        ("vitamin_small_224", {"timm_pool": ""}, "open_clip-timm-vit"),
        ("swin_tiny_patch4_window7_224", {"timm_pool": ""}, "open_clip-swin"),
        ("swin_tiny_patch4_window7_224", {"timm_pool": "", "timm_proj": ""}, None),  # not pooled
        ("swinv2_tiny_window8_256", {}, None),  # logits are cosines, with scales of their own
    ],
)
def test_exactly_one_family_takes_a_trunk(
    name: str, options: dict[str, Any], family: str | None
) -> None:
    config = {"vision_cfg": {"timm_model_name": name, **options}}
    taking = [key for key in FAMILIES if key.startswith("open_clip") and _takes(key, config)]
    assert taking == ([] if family is None else [family])


def _takes(family: str, config: dict[str, Any]) -> bool:
    return FAMILIES.get(family).takes(config)


@torch.no_grad()
def test_input_size_is_that_of_the_trunk(tmp_path: Path) -> None:
    """open_clip's configuration of ViTamin-XL-384 says 256, at which it cannot run."""
    config = of_timm("ovsprune_vitamin", timm_pool="", image_size=32)
    file = tmp_path / "open_clip_config.json"
    file.write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(
        {f"visual.{k}": v for k, v in open_clip_vitamin().tower.state_dict().items()},
        tmp_path / "open_clip_model.safetensors",
    )
    loaded = backbones.load_backbone(str(tmp_path))
    assert (loaded.family, loaded.preprocess.size) == ("open_clip-timm-vit", (64, 64))
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded.pooled(images), open_clip_vitamin().pooled(images))


def test_bottlenecks_of_vitamin_are_the_first_blocks() -> None:
    tower = open_clip_vitamin().tower
    blocks, layers = VIT.stages(tower).blocks, VIT.prunable_layers(tower)
    bottlenecks = [f"{BACKBONE}.stages.{i}.{j}" for i in range(2) for j in range(2)]
    tokens = ["trunk.blocks.0", "trunk.blocks.1"]
    assert list(blocks) == [*bottlenecks, f"{BACKBONE}.pool", *tokens]
    assert [s.name for s in layers if s.kind == "channels"] == bottlenecks
    assert [s.block for s in layers if s.kind == "heads"] == tokens
    assert [s.block for s in layers if s.protected] == tokens[1:]
    assert all(s.stream is not None for s in layers)


def test_only_norms_after_the_units_are_replaced() -> None:
    """Check ViTamin, whose MLPs have the norm in front, where nothing is cut."""
    for backbone, counted in ((open_clip_vitamin(), False), (open_clip_timm_vit(), True)):
        VIT.rewrite(backbone.tower)
        norm = backbone.tower.get_submodule("trunk.blocks.0.mlp.norm")
        assert isinstance(norm, ZeroPaddedLayerNorm) is counted


def test_groups_and_blocks_of_swin() -> None:
    tower = open_clip_swin().tower
    blocks, layers = list(SWIN.stages(tower).blocks), SWIN.prunable_layers(tower)
    assert blocks[2:4] == ["trunk.layers.1.downsample", "trunk.layers.1.blocks.0"]
    cut = [name for name in blocks if "downsample" not in name]
    assert [s.name for s in layers] == [f"{n}.{part}" for n in cut for part in ("attn", "mlp")]
    assert [s.name for s in layers if s.protected] == ["trunk.layers.2.blocks.1.attn"]
    assert {s.kind for s in layers if s.stream is None} == {"heads"}


@torch.no_grad()
def test_linear_layers_of_swin_see_one_image_per_row() -> None:
    """Calibration counts images along the first axis; windows must not appear there."""
    case = prepared(open_clip_swin())
    stages = case.backbone.stages(case.dense)
    stream = run_stem(stages, case.pictures, 5)
    name = next(iter(stages.blocks))
    layers = [(f"{name}.{layer}", "input") for layer in ("attn.q_proj", "attn.proj", "mlp.fc2")]
    for part, seen in run_block(stages.blocks[name], ActivationCache(stream[:7]), 5, layers, name):
        count = min(5, 7 - part.start)
        assert [seen[tap].shape[0] for tap in layers] == [count] * 3
        # windows of 5 x 5 in a grid of 16 x 16, which is padded for them; then the stream's grid
        assert seen[layers[1]].shape[1] == 16 * 25 and seen[layers[2]].shape[1:3] == (16, 16)


@torch.no_grad()
@pytest.mark.parametrize("make", [open_clip_vitamin, open_clip_swin])
def test_dense_output_applies_the_head_at_each_position(
    make: Callable[[], Backbone],
) -> None:
    backbone = make()
    tower: Any = backbone.tower
    images = torch.randn(2, 3, 64, 64)
    dense = backbone.dense(images)
    features = tower.trunk.forward_features(images)
    if features.ndim == 4:  # a picture of one position
        one = tower.trunk.forward_head(features[:, 1:2, 2:3])
    else:
        one = tower.trunk.forward_head(features[:, 6:7])
    assert dense.shape == (2, 24, 4, 4)
    torch.testing.assert_close(dense[:, :, 1, 2], tower.head(one), atol=1e-5, rtol=1e-4)
    assert (dense[:, :, 2, 1] - tower.head(one)).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("make", [open_clip_vitamin, open_clip_swin])
def test_checkpoint_loads_and_attaches_to_a_tower(
    make: Callable[[], Backbone], tmp_path: Path
) -> None:
    backbone = make()
    directory = tmp_path / "slim"
    done = prune(
        backbone, 0.4, output=directory, allocation="uniform", recovery="closed-form", **QUICK
    )
    assert abs(done.achieved - 0.4) < 0.01
    assert {layer.kind for layer in done.spec.layers if layer.kept < layer.units} >= {"mlp"}
    assert any(x.kind == "heads" and x.kept < x.units for x in done.spec.layers)
    assert list(done.tower.state_dict()) == list(backbone.tower.state_dict())
    images = torch.randn(2, 3, 64, 64)
    back = backbones.load_backbone(str(directory))
    assert torch.equal(back.pooled(images), backbone.stages(done.tower).outputs(images)[0])
    copied = deepcopy(backbone.tower)
    before = {name: (value, value.clone()) for name, value in copied.state_dict().items()}
    checkpoint = ovsprune.read(directory)
    applied = ovsprune.apply(copied, checkpoint)
    assert torch.equal(copied(images), done.tower(images))
    with pytest.raises(TargetError, match="is slim already; detach"):
        ovsprune.apply(copied, checkpoint)
    applied.detach()
    for name, value in copied.state_dict().items():
        same, was = before[name]
        assert value.data_ptr() == same.data_ptr() and torch.equal(value, was), name
    ovsprune.apply(copied, checkpoint, weights="target")
    assert not torch.equal(copied(images), done.tower(images))  # cut, and not repaired
