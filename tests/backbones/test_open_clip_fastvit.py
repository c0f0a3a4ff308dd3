"""FastViTs as towers of open_clip's TimmModel: names, blocks, heads on maps, the checkpoint."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import timm
import torch
from timm.models.fastvit import Attention, LayerScale2d
from timm.utils.model import reparameterize_model
from torch import nn

import ovsprune
from ovsprune import backbones
from ovsprune.backbones import FAMILIES
from ovsprune.backbones.open_clip_fastvit import OpenClipFastVit
from ovsprune.jobs.prune import PruneResult, prune
from ovsprune.slim.timm_attention import TimmAttention
from tests.contracts.conftest import open_clip_fastvit, prepared

FAMILY = FAMILIES.get("open_clip-fastvit")
QUICK: dict[str, Any] = {"samples": 6, "batch_size": 4, "probe": 2}
FIRST, LAST = (f"trunk.stages.2.blocks.{i}.token_mixer" for i in (0, 1))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> PruneResult:
    """Prune so that at most two of three heads of the first attention remain."""
    directory = tmp_path_factory.mktemp("slim") / "fastvit"
    return prune(open_clip_fastvit(), 0.4, output=directory, criterion="magnitude",
                 allocation="uniform", **QUICK)  # fmt: skip


def images() -> torch.Tensor:
    return torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))


def test_names_of_open_clip_are_listed() -> None:
    assert set(FAMILY.names()) == {
        *("MobileCLIP-S1", "MobileCLIP-S2"),
        *(f"MobileCLIP2-S{n}" for n in (0, 2, 3, 4)),
    }


@pytest.mark.parametrize(
    ("vision", "taken"),
    [
        ({"timm_model_name": "fastvit_mci1", "timm_proj": None}, True),
        ({"timm_model_name": "fastvit_mci3", "timm_proj": None}, True),  # layer norms
        ({"timm_model_name": "fastvit_t8"}, True),  # nothing attends
        ({"timm_model_name": "fastvit_mci1", "timm_pool": "abs_attn"}, False),
        ({"timm_model_name": "fastvit_mci1", "timm_pool": "", "timm_proj": ""}, False),
        ({"timm_model_name": "convnext_tiny"}, False),
    ],
)
def test_family_takes_supported_trunks_only(vision: dict[str, Any], taken: bool) -> None:
    assert FAMILY.takes({"vision_cfg": vision}) is taken


def test_trunk_without_head_is_not_taken() -> None:
    with torch.device("meta"):
        head, stages = (timm.create_model("fastvit_t8", fork_feat=f) for f in (False, True))
    assert OpenClipFastVit().takes({}, head) and not OpenClipFastVit().takes({}, stages)


def test_blocks_and_their_prunable_layers() -> None:
    backbone = open_clip_fastvit()
    assert backbone.activation == "gelu"  # a gate in a downsampling layer has another one
    assert any(isinstance(m, nn.ReLU) for m in backbone.tower.modules())
    layers = {layer.name: layer for layer in FAMILY.prunable_layers(backbone.tower)}
    blocks = [name.removeprefix("trunk.stages.") for name in FAMILY.stages(backbone.tower).blocks]
    assert blocks == [
        *("0.blocks.0", "1.downsample", "1.blocks.0"),
        *("2.downsample", "2.pos_emb", "2.blocks.0", "2.blocks.1"),
    ]
    offered = [f"trunk.stages.{name}" for name in blocks if "blocks" in name]
    assert [s.block for s in layers.values() if s.kind == "mlp"] == offered
    assert [name for name, s in layers.items() if s.kind == "heads"] == [FIRST, LAST]
    assert [name for name, s in layers.items() if s.protected] == [LAST]
    assert (layers[FIRST].unit_width, layers[FIRST].extra_slices[0].rows.tolist()) == (
        32,
        [[0], [1], [2]],
    )


@torch.no_grad()
def test_folded_layers_output_the_addition_to_the_stream() -> None:
    case = prepared(open_clip_fastvit(), 4)
    name = "trunk.stages.2.blocks.0"
    block: Any = case.dense.get_submodule(name)
    before: Any = case.backbone.tower.get_submodule(name)
    seen: dict[str, torch.Tensor] = {}

    def keep(key: str) -> Any:
        return lambda module, read, given: seen.update({key: given, f"{key} reads": read[0]})

    for key, layer in (("heads", block.token_mixer.proj), ("mlp", block.mlp)):
        layer.register_forward_hook(keep(key))
    stream = torch.randn(2, 96, 4, 5)
    given = block(stream)
    torch.testing.assert_close(given, before(stream), atol=1e-5, rtol=1e-4)
    middle = stream + seen["heads"].movedim(-1, 1)
    torch.testing.assert_close(seen["mlp reads"], middle, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(given, middle + seen["mlp"], atol=1e-5, rtol=1e-5)
    FAMILY.finish(case.dense, case.groups, case.full_plan())
    for scale in ("layer_scale_1", "layer_scale_2"):
        made = getattr(block, scale)
        assert type(made) is LayerScale2d and not made.training
        assert torch.equal(made.gamma, getattr(before, scale).gamma)
    assert type(block.token_mixer) is Attention


@torch.no_grad()
def test_dense_output_applies_the_head_at_each_position() -> None:
    backbone = open_clip_fastvit()
    tower: Any = backbone.tower
    pictures = torch.randn(2, 3, 96, 64)
    pooled, dense = backbone.outputs(pictures)
    assert dense.shape == (2, 24, 6, 4)
    torch.testing.assert_close(pooled, tower(pictures), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(dense.mean((2, 3)), pooled, atol=1e-5, rtol=1e-4)
    features = tower.trunk.forward_features(pictures)
    expected = tower.trunk.head.fc(features[:, :, 2, 3])
    torch.testing.assert_close(dense[:, :, 2, 3], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_checkpoint_loads_identical_outputs(pruned: PruneResult) -> None:
    assert pruned.path is not None and abs(pruned.achieved - 0.4) < 0.01
    assert len(pruned.plan.kept[FIRST]) < 3 and LAST in pruned.spec.protected
    expected = FAMILY.stages(pruned.tower).outputs(images())
    tower, back = ovsprune.load(pruned.path), backbones.load_backbone(str(pruned.path))
    assert torch.equal(tower(images()), expected[0])
    assert torch.equal(tower.dense(images()), expected[1])
    assert torch.equal(back.pooled(images()), expected[0])
    assert torch.equal(back.dense(images()), expected[1])
    assert list(pruned.tower.state_dict()) == list(open_clip_fastvit().tower.state_dict())


@torch.no_grad()
def test_attach_and_detach_on_a_built_tower(pruned: PruneResult) -> None:
    built = open_clip_fastvit().tower
    before, checkpoint = built(images()), ovsprune.read(pruned.path)
    applied = ovsprune.apply(built, checkpoint)
    assert torch.equal(built(images()), pruned.tower(images()))
    types = [type(built.get_submodule(name)) for name in (FIRST, LAST)]
    assert types == [TimmAttention, Attention]
    applied.detach()
    assert torch.equal(built(images()), before)
    assert type(built.get_submodule(FIRST)) is Attention


@torch.no_grad()
def test_branches_of_the_slim_tower_can_be_merged(pruned: PruneResult) -> None:
    tower = deepcopy(pruned.tower)
    merged = reparameterize_model(tower)
    assert len(list(merged.modules())) < len(list(pruned.tower.modules()))
    expected = pruned.tower(images())
    assert (merged(images()) - expected).abs().max() < 1e-4 * expected.std()


def test_random_weights_of_a_listed_name_are_marked() -> None:
    backbone = backbones.load_backbone("MobileCLIP2-S0", pretrained="none")
    assert (backbone.trained, backbone.pretrained, backbone.family) == (
        False,
        None,
        "open_clip-fastvit",
    )
    assert backbone.preprocess.size == (256, 256) and backbone.activation == "gelu"
    assert backbone.has_text
