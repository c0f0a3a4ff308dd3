"""Prune of a slim model: equal to one cut of its base by the composed mask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ovsprune
from ovsprune import backbones
from ovsprune.allocation import ALLOCATIONS
from ovsprune.baselines.imp_weights import imp
from ovsprune.core.errors import OptionError
from ovsprune.core.protocols import Backbone
from ovsprune.core.records import Plan
from ovsprune.graph.costs import count_costs
from ovsprune.jobs.prune import PruneResult, prune
from ovsprune.pruning.reprune import in_base, layers_in_base
from ovsprune.slim import SlimCheckpoint
from ovsprune.slim.cutting import cut_state
from ovsprune.slim.spec import LayerSpec, SliceSpec
from tests.contracts.conftest import REPRESENTATIVES, open_clip_vit
from tests.tiers import by_default

QUICK: dict[str, Any] = {"samples": 8, "batch_size": 8, "probe": 4}
QUICK_FAMILIES = {"open_clip-vit", "open_clip-resnet", "open_clip-convnext"}
PLAIN: dict[str, Any] = {
    **QUICK,
    "criterion": "magnitude",
    "allocation": "uniform",
    "recovery": "none",
}


@pytest.fixture(scope="module", params=by_default(REPRESENTATIVES, QUICK_FAMILIES))
def base(request: pytest.FixtureRequest) -> Backbone:
    return REPRESENTATIVES[request.param]()


@pytest.fixture(scope="module")
def once(base: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("slim") / "once"
    prune(base, 0.3, output=output, **PLAIN)
    return output


@pytest.fixture(scope="module")
def twice(base: Backbone, once: Path) -> PruneResult:
    output = once.parent / "twice"
    return prune(str(once), 0.2, output=output, **PLAIN)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a slim checkpoint of the small ViT."""
    output = tmp_path_factory.mktemp("slim") / "small"
    prune(open_clip_vit(), 0.3, output=output, **QUICK)
    return output


def test_the_result_is_one_cut_by_the_composed_mask(
    base: Backbone, once: Path, twice: PruneResult
) -> None:
    assert twice.path is not None
    first, second = ovsprune.read(once), ovsprune.read(twice.path)
    for name, kept in second.mask.items():
        assert set(kept.tolist()) <= set(first.mask[name].tolist()), name
    assert any(len(second.mask[n]) < len(first.mask[n]) for n in first.mask)
    expected = cut_state(base.tower.state_dict(), second.spec, second.mask)
    found = second.tower()
    assert list(expected) and set(found) == set(expected)
    # norms that were folded and taken out again may differ in the last bit
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-6, msg=name)


def test_the_result_equals_the_masked_base(base: Backbone, twice: PruneResult) -> None:
    assert twice.path is not None
    applied = REPRESENTATIVES[base.family]()
    checkpoint = ovsprune.read(twice.path)
    ovsprune.apply(applied.tower, checkpoint, weights="target")  # the base's own weights, cut
    images = torch.randn(2, 3, *base.preprocess.size, generator=torch.Generator().manual_seed(1))
    expected = _flat(applied.outputs(images))
    loaded = ovsprune.load(twice.path)
    for given in (loaded.outputs(images), backbones.load_backbone(str(twice.path)).outputs(images)):
        assert (_flat(given) - expected).abs().max() / expected.std() < 1e-4
    assert (_flat(base.outputs(images)) - expected).abs().max() / expected.std() > 1e-2


def _flat(both: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat([x.detach().flatten() for x in both])


def test_the_ratio_refers_to_the_slim_model(base: Backbone, once: Path, twice: PruneResult) -> None:
    first, record = ovsprune.read(once).spec, twice.record()
    given, left = first.slim, count_costs(twice.tower, base.preprocess.size)
    assert record["given"] == {"slim": str(once), "macs": given.macs, "params": given.params}
    assert record["achieved"] == pytest.approx(1 - left.macs / given.macs)
    assert abs(record["achieved"] - 0.2) <= 0.01
    assert twice.spec.slim == left


def test_the_base_is_the_first_dense_model(base: Backbone, once: Path, twice: PruneResult) -> None:
    first = ovsprune.read(once).spec
    assert twice.spec.base == first.base
    assert twice.spec.dense == first.dense == count_costs(base.tower, base.preprocess.size)
    assert [x.name for x in twice.spec.layers] == [x.name for x in first.layers]
    assert all(
        replace(now, kept=0) == replace(before, kept=0)
        for now, before in zip(twice.spec.layers, first.layers, strict=True)
    )
    made = twice.spec.provenance
    assert made["given"]["provenance"] == first.provenance
    assert made["given"]["macs"] == first.slim.macs
    assert made["command"].startswith("ovsprune prune --model once --ratio 0.2 --samples 8")
    card = (twice.path / "README.md").read_text("utf-8")  # type: ignore[operator]
    assert "against the slim tower before" in card
    assert "of once, which was pruned before" in card


def test_recovery_reconstructs_the_slim_model(small: Path, tmp_path: Path) -> None:
    """Check that the second result is closer to the slim tower than to the dense one."""
    again = prune(str(small), 0.1, output=tmp_path / "again", **QUICK)
    dense, given = open_clip_vit(), ovsprune.load(small)
    images = torch.randn(8, 3, 48, 48, generator=torch.Generator().manual_seed(2))
    found = ovsprune.load(tmp_path / "again").dense(images).detach()

    def far(other: Tensor) -> float:
        return float((found - other).norm() / other.norm())

    assert far(given.dense(images).detach()) < far(dense.dense(images))
    third = prune(str(tmp_path / "again"), 0.1, dry_run=True, **PLAIN)
    assert third.spec.base == again.spec.base
    made = third.spec.provenance["given"]
    assert made["macs"] == again.spec.slim.macs
    assert made["provenance"]["given"]["macs"] == ovsprune.read(small).spec.slim.macs


def test_a_protected_layer_keeps_its_first_cut(small: Path) -> None:
    first = ovsprune.read(small)
    result = prune(str(small), 0.2, protect=("*.0.*",), dry_run=True, **PLAIN)
    for name in ("transformer.resblocks.0.attn", "transformer.resblocks.0.mlp"):
        assert torch.equal(result.plan.kept[name], first.mask[name])
        assert result.spec.layer(name) == first.spec.layer(name)
        assert name in result.spec.protected
    assert [x.name for x in result.spec.layers] == [x.name for x in first.spec.layers]


def test_a_layer_protected_in_the_first_prune_can_be_cut(tmp_path: Path) -> None:
    prune(open_clip_vit(), 0.2, protect=("*.1.*",), output=tmp_path / "a", **PLAIN)
    result = prune(str(tmp_path / "a"), 0.3, output=tmp_path / "b", **PLAIN)
    names = [x.name.removeprefix("transformer.resblocks.") for x in result.spec.layers]
    assert names == ["0.attn", "0.mlp", "1.attn", "1.mlp", "2.mlp"]
    assert result.spec.layer("transformer.resblocks.1.mlp").units == 128
    assert result.plan.width("transformer.resblocks.1.mlp") < 128
    second = ovsprune.read(tmp_path / "b")
    expected = cut_state(open_clip_vit().tower.state_dict(), second.spec, second.mask)
    assert all(torch.equal(second.tower()[name], tensor) for name, tensor in expected.items())


def test_offsets_of_layers_that_share_an_axis_refer_to_the_base(small: Path) -> None:
    """Check the offset of the second of two groups on one axis after the first was cut."""
    block = "transformer.resblocks.0"
    first, second = (
        LayerSpec(f"{block}.{n}", "mlp", block, 64, kept, 1, (SliceSpec(f"{block}.x", "out", at),))
        for n, at, kept in (("a", 0, 10), ("b", 64, 64))
    )
    checkpoint = ovsprune.read(small)
    given = SlimCheckpoint(
        small,
        replace(checkpoint.spec, layers=(first,)),
        {first.name: torch.arange(10)},
        {f"visual.{block}.x.weight": torch.zeros(74, 3)},
    )
    here = replace(second, kept=5, slices=(SliceSpec(f"{block}.x", "out", 10),))
    found = layers_in_base(given, [here], [first.name, second.name])
    assert found == (first, replace(second, kept=5))


def test_plans_of_a_dense_model_are_unchanged() -> None:
    plan = Plan({"a": torch.tensor([1, 2])})
    assert in_base(None, plan) is plan


def test_keeping_all_units_returns_the_slim_tower(once: Path, base: Backbone) -> None:
    from ovsprune.backbones import FAMILIES

    backbone, family = backbones.load_backbone(str(once)), FAMILIES.get(base.family)
    before = {k: v.clone() for k, v in backbone.tower.state_dict().items()}
    images = torch.randn(2, 3, *base.preprocess.size)
    expected = _flat(backbone.outputs(images))
    family.rewrite(backbone.tower)
    torch.testing.assert_close(_flat(backbone.outputs(images)), expected, atol=1e-5, rtol=1e-4)
    family.finish(backbone.tower, [], Plan({}))
    after = backbone.tower.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_default_output_is_named_after_the_directory(
    small: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = prune(str(small), 0.1, **PLAIN)
    assert result.path == tmp_path / "slim" / "small-r0.1"


def test_iterative_magnitude_pruning_starts_at_a_dense_model(small: Path) -> None:
    with pytest.raises(
        OptionError,
        match="small is slim already, and --method imp starts at a dense model.*higher ratio",
    ):
        prune(str(small), 0.2, method="imp", imp_structured=True, recovery="none")


def test_an_unstructured_result_is_refused(tmp_path: Path) -> None:
    imp(open_clip_vit(), 0.3, samples=4, imp_steps=0, output=tmp_path / "zeros")
    with pytest.raises(OptionError, match="is an unstructured result.*prune its dense model"):
        prune(str(tmp_path / "zeros"), 0.2, **QUICK)


@pytest.mark.parametrize("allocation", ALLOCATIONS.names())
def test_widths_of_an_earlier_prune_are_rounded(small: Path, allocation: str) -> None:
    """Round the width that an earlier prune left to the requested multiple."""
    before = [x for x in ovsprune.read(small).spec.layers if x.kind == "mlp"]
    assert any(x.kept % 8 and x.kept < x.units for x in before)
    again = prune(str(small), 0.2, round_to=8, dry_run=True, **{**PLAIN, "allocation": allocation})
    assert all(x.kept % 8 == 0 for x in again.spec.layers if x.kind == "mlp")
