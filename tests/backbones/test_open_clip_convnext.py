"""ConvNeXts as towers of open_clip's TimmModel: names, heads, layer scales, the checkpoint."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ovsprune
from ovsprune import backbones
from ovsprune.backbones import FAMILIES
from ovsprune.core.errors import WeightsError
from ovsprune.core.records import DenseModel, Preprocess
from ovsprune.jobs.prune import prune
from tests.contracts.conftest import (
    of_timm,
    open_clip_convnext,
    open_clip_convnext_conv,
    prepared,
    squeezed,
)

FAMILY = FAMILIES.get("open_clip-convnext")
QUICK: dict[str, Any] = {"samples": 6, "batch_size": 4, "probe": 2}


def test_names_of_open_clip_are_listed() -> None:
    names = set(FAMILY.names())
    for end in ("base", "base_w_320", "large_d", "small", "tiny", "xlarge", "xxlarge_320"):
        assert f"convnext_{end}" in names
    assert all(name.startswith("convnext_") for name in names)


@pytest.mark.parametrize(
    ("vision", "taken"),
    [
        ({"timm_model_name": "convnext_atto"}, True),  # 1x1 convolutions
        ({"timm_model_name": "convnext_tiny", "timm_pool": ""}, True),
        ({"timm_model_name": "convnext_tiny", "timm_proj": "mlp"}, True),
        ({"timm_model_name": "convnextv2_atto"}, False),  # a norm over all units
        ({"timm_model_name": "convnext_tiny", "timm_pool": "abs_attn"}, False),
        ({"timm_model_name": "resnet18"}, False),
    ],
)
def test_family_takes_supported_trunks_only(vision: dict[str, Any], taken: bool) -> None:
    assert FAMILY.takes({"vision_cfg": vision}) is taken


def test_downsampling_layers_are_blocks_without_groups() -> None:
    tower = open_clip_convnext().tower
    stages, layers = FAMILY.stages(tower), FAMILY.prunable_layers(tower)
    assert list(stages.blocks)[:4] == [
        "trunk.stages.0.blocks.0",
        "trunk.stages.1.downsample",
        "trunk.stages.1.blocks.0",
        "trunk.stages.2.downsample",
    ]
    assert [s.block for s in layers] == [n for n in stages.blocks if "downsample" not in n]
    assert {s.kind for s in layers} == {"mlp"} and not any(s.protected for s in layers)


@torch.no_grad()
@pytest.mark.parametrize("projection", ["linear", "mlp", "none"])
def test_dense_output_applies_the_head_at_each_position(projection: str) -> None:
    config = of_timm("ovsprune_convnext", timm_proj=projection, image_size=64)
    backbone = FAMILY.build(DenseModel("x", config, Preprocess((64, 64))))
    tower: Any = backbone.tower
    tower.trunk.head.norm.weight.uniform_(0.2, 2)
    images = torch.randn(2, 3, 64, 96)
    features = tower.trunk.forward_features(images)
    dense = backbone.dense(images)
    assert dense.shape == (2, 20 if projection == "none" else 24, 2, 3)
    one = features[:, :, 1:2, 2:3]  # a picture of one position
    expected = tower.head(tower.trunk.forward_head(one))
    torch.testing.assert_close(dense[:, :, 1, 2], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(backbone.pooled(images), tower(images), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("make", [open_clip_convnext, open_clip_convnext_conv])
def test_folded_layer_outputs_the_addition_to_the_stream(make: Any) -> None:
    case = prepared(make(), 4)
    block: Any = case.dense.get_submodule("trunk.stages.2.blocks.1")
    assert block.gamma is None
    stream = torch.randn(2, 16, 4, 4)
    before: Any = case.backbone.tower.get_submodule("trunk.stages.2.blocks.1")
    torch.testing.assert_close(block(stream), before(stream), atol=1e-5, rtol=1e-5)
    seen = []
    block.mlp.fc2.register_forward_hook(lambda *args: seen.append(args[2]))
    given = block(stream) - stream
    added = seen[0] if block.use_conv_mlp else seen[0].movedim(-1, 1)
    torch.testing.assert_close(given, added, atol=1e-5, rtol=1e-5)
    FAMILY.finish(case.dense, case.groups, case.full_plan())
    assert torch.equal(block.gamma, before.gamma) and not hasattr(block, "folded")


def test_tiny_layer_scales_give_finite_weights(tmp_path: Path) -> None:
    """Test half precision, where 1 / 1e-6 is infinite."""
    backbone = open_clip_convnext()
    for name, tensor in backbone.tower.named_parameters():
        if name.endswith("gamma"):
            tensor.data.fill_(1e-6)
            tensor.data[::2] = 0.5
    done = prune(backbone, 0.4, output=tmp_path / "slim", dtype="float16",
                 recovery="gauss-newton", **QUICK)  # fmt: skip
    state = ovsprune.load(tmp_path / "slim").tower.state_dict()
    assert all(tensor.isfinite().all() for tensor in state.values())
    dense = backbone.tower.state_dict()
    longest = {k: v.abs().max() for k, v in dense.items()}
    assert all(state[k].abs().max() <= 20 * longest[k] for k in state if k.endswith("fc2.weight"))
    assert done.fidelity.cosine > 0.9


@pytest.mark.parametrize("make", [open_clip_convnext, open_clip_convnext_conv, squeezed])
@torch.no_grad()
def test_checkpoint_loads_and_attaches_to_a_tower(make: Any, tmp_path: Path) -> None:
    backbone = make()
    directory = tmp_path / "slim"
    done = prune(backbone, 0.4, output=directory, **QUICK)
    assert abs(done.achieved - 0.4) < 0.01
    images = torch.randn(2, 3, *backbone.preprocess.size)
    tower, back = ovsprune.load(directory), backbones.load_backbone(str(directory))
    expected = backbone.stages(done.tower).outputs(images)
    assert torch.equal(tower(images), expected[0]) and torch.equal(tower.dense(images), expected[1])
    assert torch.equal(back.pooled(images), expected[0])
    assert torch.equal(back.dense(images), expected[1])
    assert list(done.tower.state_dict()) == list(backbone.tower.state_dict())
    copied = deepcopy(backbone.tower)
    before = copied(images)
    applied = ovsprune.apply(copied, ovsprune.read(directory))
    assert torch.equal(copied(images), expected[0])
    applied.detach()
    assert torch.equal(copied(images), before)


def test_name_without_default_weights_lists_its_tags() -> None:
    with pytest.raises(WeightsError, match="no default.*laion2b_s13b_b82k"):
        backbones.load_backbone("convnext_base_w")


def test_random_weights_of_a_listed_name_are_marked() -> None:
    with torch.device("cpu"):
        backbone = backbones.load_backbone("convnext_tiny", pretrained="none")
    assert (backbone.trained, backbone.pretrained, backbone.family) == (
        False,
        None,
        "open_clip-convnext",
    )
    assert backbone.preprocess.size == (224, 224) and backbone.activation == "gelu"
    assert isinstance(backbone.tower.get_submodule("head.proj"), nn.Linear)
