"""Depth pruning (``--prune-depth``): removal of whole attentions and MLPs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import Tensor

import ovsprune
from ovsprune.backbones import FAMILIES
from ovsprune.core.errors import OptionError
from ovsprune.core.protocols import Backbone
from ovsprune.core.records import Plan
from ovsprune.graph.costs import count_costs
from ovsprune.graph.cut import mask
from ovsprune.graph.groups import find_groups
from ovsprune.jobs.export import export
from ovsprune.jobs.inspect import inspect
from ovsprune.jobs.prune import PruneResult, prune
from ovsprune.pruning.search_space import split_protected
from ovsprune.slim.spec import schema
from tests.contracts.conftest import (
    REPRESENTATIVES,
    open_clip_convnext_conv,
    open_clip_timm_siglip,
    open_clip_vit,
)

QUICK: dict[str, Any] = {"samples": 8, "batch_size": 8, "probe": 4}
USELESS = {
    "open_clip-vit": (
        open_clip_vit,
        ("transformer.resblocks.0.attn.out_proj", "transformer.resblocks.1.mlp.c_proj"),
        ("transformer.resblocks.0.attn", "transformer.resblocks.1.mlp"),
    ),
    "open_clip-timm-vit": (
        open_clip_timm_siglip,
        ("trunk.blocks.0.attn.proj", "trunk.blocks.1.mlp.fc2"),
        ("trunk.blocks.0.attn", "trunk.blocks.1.mlp"),
    ),
    "transformers-vit": (
        REPRESENTATIVES["transformers-vit"],
        ("encoder.layers.0.self_attn.out_proj", "encoder.layers.1.mlp.fc2"),
        ("encoder.layers.0.self_attn", "encoder.layers.1.mlp"),
    ),
    "open_clip-convnext": (
        REPRESENTATIVES["open_clip-convnext"],
        ("trunk.stages.0.blocks.0.mlp.fc2",),
        ("trunk.stages.0.blocks.0.mlp",),
    ),
}
"""A tower, layers of it whose weight is made zero, and the groups that then do nothing."""


def useless(make: Callable[[], Backbone], layers: tuple[str, ...]) -> Backbone:
    backbone = make()
    with torch.no_grad():
        for name in layers:
            backbone.tower.get_submodule(name).weight.zero_()
    return backbone


@pytest.fixture(scope="module", params=USELESS)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def backbone(family: str) -> Backbone:
    make, layers, _ = USELESS[family]
    return useless(make, layers)


@pytest.fixture(scope="module")
def result(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> PruneResult:
    output = tmp_path_factory.mktemp("slim") / "shallow"
    return prune(backbone, 0.4, prune_depth=True, recovery="none", output=output, **QUICK)


@pytest.fixture(scope="module")
def directory(result: PruneResult) -> Path:
    assert result.path is not None
    return result.path


def pictures(backbone: Backbone, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, *backbone.preprocess.size, generator=generator)


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.std())


def test_layers_without_effect_are_removed(
    family: str, result: PruneResult, directory: Path
) -> None:
    kept = {layer.name: layer.kept for layer in result.spec.layers}
    gone = [name for name, units in kept.items() if units == 0]
    assert set(USELESS[family][2]) <= set(gone)
    assert len(gone) < len(kept)
    assert result.spec.provenance["prune_depth"] is True
    jsonschema.validate(json.loads((directory / "config.json").read_text()), schema())


def test_the_ratio_is_reached(result: PruneResult, backbone: Backbone) -> None:
    dense, slim = result.spec.dense, result.spec.slim
    assert slim == count_costs(result.tower, backbone.preprocess.size)
    assert 0.4 - 1e-9 <= 1 - slim.macs / dense.macs <= 0.41


@torch.no_grad()
def test_the_slim_tower_equals_the_masked_tower(backbone: Backbone, result: PruneResult) -> None:
    """Compare the pooled and dense outputs; the masked tower differs from the dense one."""
    of = FAMILIES.get(backbone.family)
    masked = deepcopy(backbone.tower).float().eval()
    of.rewrite(masked)
    free, _ = split_protected(of.prunable_layers(masked), ())
    groups = find_groups(masked, free, backbone.preprocess.size)
    mask(masked, groups, Plan(result.plan.kept))
    images = pictures(backbone)
    wanted = of.stages(masked).outputs(images)
    dense = of.stages(backbone.tower).outputs(images)
    for now, then, before in zip(
        of.stages(result.tower).outputs(images), wanted, dense, strict=True
    ):
        assert far(now, then) < 1e-4
        assert far(before, then) > 1e-2


@torch.no_grad()
def test_the_checkpoint_loads_bit_for_bit(
    backbone: Backbone, result: PruneResult, directory: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # torch's, of tensors without entries
        loaded = ovsprune.load(directory)
    state = result.tower.state_dict()
    found = loaded.tower.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    images = pictures(backbone)
    assert far(loaded(images), result.tower(images)) < 1e-5


@torch.no_grad()
def test_the_slim_tower_is_attached_and_detached(
    backbone: Backbone, result: PruneResult, directory: Path
) -> None:
    tower, images = deepcopy(backbone.tower), pictures(backbone)
    before = tower(images)
    applied = ovsprune.apply(tower, ovsprune.read(directory), weights="target")
    found = tower(images)
    applied.detach()
    assert torch.equal(tower(images), before)
    wanted = result.tower(images)
    assert far(found, wanted) < 1e-4 < 1e-2 < far(before, wanted)


def test_a_slim_model_is_pruned_again(result: PruneResult, directory: Path, tmp_path: Path) -> None:
    """Keep removed layers removed, with recovery, and their names in the base."""
    again = prune(str(directory), 0.1, output=tmp_path / "again", **QUICK)
    for layer in result.spec.layers:
        then = again.spec.layer(layer.name)
        assert then.units == layer.units
        assert then.kept <= layer.kept
    assert not any(tensor.isnan().any() for tensor in again.tower.state_dict().values())


@pytest.fixture(scope="module")
def constant() -> Backbone:
    """Return a ViT with an attention whose output is the same at every position."""
    small = open_clip_vit()
    attention: Any = small.tower.get_submodule("transformer.resblocks.0.attn")
    with torch.no_grad():
        attention.in_proj_weight[2 * attention.embed_dim :].zero_()  # values: their bias alone
        attention.in_proj_bias[2 * attention.embed_dim :].normal_()
    return small


@pytest.fixture(scope="module")
def unrepaired(constant: Backbone) -> PruneResult:
    return prune(constant, 0.3, prune_depth=True, recovery="none", **QUICK)


@pytest.mark.parametrize("recovery", ["bias", "closed-form", "closed-form-symmetric"])
def test_the_bias_replaces_a_removed_attention(
    constant: Backbone, unrepaired: PruneResult, recovery: str
) -> None:
    """Check that the bias reproduces an attention with a constant output."""
    attention: Any = constant.tower.get_submodule("transformer.resblocks.0.attn")
    found = prune(constant, 0.3, prune_depth=True, recovery=recovery, **QUICK)
    assert found.spec.layer("transformer.resblocks.0.attn").kept == 0
    slim: Any = found.tower.get_submodule("transformer.resblocks.0.attn")
    mean = attention.out_proj(attention.in_proj_bias[2 * attention.embed_dim :]).detach()
    assert far(slim.out_proj.bias.detach(), mean) < 0.05
    assert found.fidelity.relative_error < unrepaired.fidelity.relative_error


def test_a_floor_prevents_removal() -> None:
    small = useless(open_clip_vit, USELESS["open_clip-vit"][1])
    options: dict[str, Any] = {"prune_depth": True, "recovery": "none", "floor": ("*.attn=1",)}
    found = prune(small, 0.4, **options, **QUICK)
    assert found.spec.layer("transformer.resblocks.0.attn").kept == 1
    assert found.spec.layer("transformer.resblocks.1.mlp").kept == 0


def test_depth_pruning_is_off_by_default() -> None:
    small = useless(open_clip_vit, USELESS["open_clip-vit"][1])
    found = prune(small, 0.4, recovery="none", **QUICK)
    assert all(layer.kept for layer in found.spec.layers)
    assert "prune_depth" not in found.spec.provenance


@pytest.mark.parametrize(
    ("options", "allocation"),
    [
        ({"uniform_heads": True}, "sensitivity"),
        ({"rounds": 2}, "sensitivity"),
        ({}, "global"),
        ({}, "isomorphic"),
    ],
)
def test_depth_pruning_combines_with_other_options(
    options: dict[str, Any], allocation: str
) -> None:
    small = useless(open_clip_vit, USELESS["open_clip-vit"][1])
    found = prune(
        small, 0.5, prune_depth=True, allocation=allocation, recovery="bias", **options, **QUICK
    )
    assert found.spec.layer("transformer.resblocks.1.mlp").kept == 0
    assert found.achieved == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("make", [REPRESENTATIVES["open_clip-resnet"], open_clip_convnext_conv])
def test_convolutions_cannot_be_removed(make: Callable[[], Backbone]) -> None:
    with pytest.raises(
        OptionError, match="--prune-depth: no layer of this model .* can be removed entirely"
    ):
        prune(make(), 0.3, prune_depth=True, recovery="none", **QUICK)


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a slim checkpoint of a ViT without one attention and one MLP."""
    small = useless(open_clip_vit, USELESS["open_clip-vit"][1])
    output = tmp_path_factory.mktemp("slim") / "vit"
    prune(small, 0.4, prune_depth=True, recovery="none", output=output, **QUICK)
    return output


def test_inspect_shows_removed_layers(shallow: Path) -> None:
    layers = inspect(str(shallow))["layers"]
    assert {row["name"] for row in layers if row["kept"] == 0} >= {"transformer.resblocks.1.mlp"}


def test_a_tower_without_some_layers_is_exported(shallow: Path, tmp_path: Path) -> None:
    """Export; it compares the graph with the tower and raises an error if they differ."""
    found = export(shallow, output=tmp_path / "tower.onnx", pairs=1)
    assert found["checks"] and found["relative_error"] <= 1e-4
