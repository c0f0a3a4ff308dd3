"""prune --prune-width and --prune-stages: residual streams that lose channels."""

from __future__ import annotations

import json
import subprocess
import sys
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
from ovsprune.core.errors import CheckpointError, OptionError, TargetError
from ovsprune.core.protocols import Backbone, Streamed
from ovsprune.core.records import DenseModel, Group, Plan
from ovsprune.graph.costs import measure
from ovsprune.graph.cut import mask
from ovsprune.graph.groups import find_groups
from ovsprune.graph.residual import count_cut
from ovsprune.jobs.export import export
from ovsprune.jobs.inspect import inspect
from ovsprune.jobs.prune import PruneResult, prune
from ovsprune.jobs.transfer import transfer
from ovsprune.recovery.readers import refit_readers
from ovsprune.slim.cutting import cut_state
from ovsprune.slim.norms import CountedLayerNorm
from ovsprune.slim.spec import STREAM_KINDS, SlimSpec, schema
from ovsprune.targets import TARGETS
from tests.contracts.conftest import (
    REPRESENTATIVES,
    Case,
    open_clip_convnext,
    open_clip_timm_siglip,
    open_clip_vit,
    prepared,
)
from tests.contracts.test_recoveries import recovered
from tests.targets.by_hand import MiniSan, small_tower

QUICK: dict[str, Any] = {"samples": 8, "batch_size": 8, "probe": 4}
IMP: dict[str, Any] = {"method": "imp", "imp_structured": True, "recovery": "none"}
STREAMED = [n for n in FAMILIES.names() if isinstance(FAMILIES.get(n), Streamed)]


def lively(make: Callable[[], Backbone]) -> Backbone:
    """Norms' and attention's biases are no zeros, so that every tensor of the stream counts."""
    backbone = make()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in backbone.tower.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * parameter.std(correction=0).clamp_min(0.1) * noise)
    return backbone


@pytest.fixture(scope="module", params=STREAMED)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return lively(REPRESENTATIVES[request.param])


def asked(backbone: Backbone) -> dict[str, Any]:
    """The option that offers the streams of a backbone."""
    family = FAMILIES.get(backbone.family)
    assert isinstance(family, Streamed)
    return {STREAM_KINDS[family.stream_kind]: True}


def pruned(backbone: Backbone, ratio: float, **options: Any) -> PruneResult:
    return prune(backbone, ratio, **{**QUICK, **asked(backbone), **options})


@pytest.fixture(scope="module")
def result(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> PruneResult:
    """No recovery, so that the slim weights are the dense ones, cut."""
    return pruned(backbone, 0.5, recovery="none", output=tmp_path_factory.mktemp("slim") / "small")


@pytest.fixture(scope="module")
def directory(result: PruneResult) -> Path:
    assert result.path is not None
    return result.path


def pictures(backbone: Backbone, size: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    height, width = backbone.preprocess.size
    return torch.randn(2, 3, size or height, size or width, generator=generator)


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.std())


def streams_of(case: Case) -> list[Group]:
    return [group for group in case.groups if group.across]


def with_streams(backbone: Backbone) -> Case:
    """The contracts' case, streams among its groups."""
    case = prepared(backbone)
    family: Any = FAMILIES.get(backbone.family)
    seeds = [s for s in (*family.seeds(case.dense), *family.streams(case.dense)) if not s.protected]
    case.groups = find_groups(case.dense, seeds, backbone.preprocess.size)
    count_cut(case.dense, case.groups)
    return case


@pytest.fixture(scope="module")
def case(backbone: Backbone) -> Case:
    return with_streams(backbone)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slim ViT whose residual stream is narrower."""
    place = tmp_path_factory.mktemp("slim") / "narrow"
    prune(lively(open_clip_vit), 0.5, prune_width=True, recovery="none", output=place, **QUICK)
    return place


@pytest.mark.parametrize("budget", ["macs", "params"])
def test_the_ratio_is_reached(backbone: Backbone, budget: str) -> None:
    found = pruned(backbone, 0.3, budget=budget, recovery="none")
    dense, slim = found.spec.dense, found.spec.slim
    assert slim == measure(found.tower, backbone.preprocess.size)
    gone = {"macs": 1 - slim.macs / dense.macs, "params": 1 - slim.params / dense.params}[budget]
    assert 0.3 - 1e-9 <= gone <= 0.31
    assert found.spec.interface


def test_the_checkpoint_says_that_the_interface_has_changed(
    result: PruneResult, directory: Path
) -> None:
    document = json.loads((directory / "config.json").read_text())
    jsonschema.validate(document, schema())
    narrow = {x.name for x in result.spec.layers if x.kind in STREAM_KINDS and x.kept < x.units}
    assert document["format_version"] == 3
    assert set(document["interface"]) == narrow != set()
    assert inspect(directory)["interface"] == document["interface"]
    assert "reads it from outside the tower" in (directory / "README.md").read_text()


@torch.no_grad()
def test_slim_equals_masked(backbone: Backbone, case: Case, result: PruneResult) -> None:
    """Pooled and dense; with the stream whole, or other channels of it gone, it is another."""
    plan, images = result.plan, pictures(backbone)
    others = {
        g.name: torch.arange(g.units).flip(0)[: plan.width(g.name)].sort().values
        for g in streams_of(case)
    }
    assert any(not torch.equal(plan.kept[name], kept) for name, kept in others.items())
    outputs = []
    for kept in ({}, others):
        masked = deepcopy(case.dense)
        mask(masked, case.groups, Plan({**plan.kept, **kept}))
        outputs.append(case.outputs(masked, images))
    found = case.outputs(result.tower, images)
    assert far(found, outputs[0]) < 1e-4 < 1e-2 < far(found, outputs[1])
    assert far(found, case.outputs(backbone.tower, images)) > 1e-2


@torch.no_grad()
def test_a_fresh_process_loads_it_bit_for_bit(directory: Path, tmp_path: Path) -> None:
    program = (
        "import sys, torch, ovsprune, tests.contracts.conftest\n"
        "torch.save(ovsprune.load(sys.argv[1]).tower.state_dict(), sys.argv[2])"
    )
    out = tmp_path / "state.pt"
    subprocess.run([sys.executable, "-c", program, str(directory), str(out)], check=True)
    found, stored = torch.load(out, weights_only=True), ovsprune.read(directory).tower()
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.items())


@torch.no_grad()
def test_what_is_loaded_computes_what_was_pruned(
    backbone: Backbone, result: PruneResult, directory: Path
) -> None:
    loaded, images = ovsprune.load(directory), pictures(backbone)
    assert far(loaded(images), result.tower(images)) < 1e-5
    again = ovsprune.backbones.load(str(directory))
    assert far(again.dense(images), backbone.stages(result.tower).outputs(images)[1]) < 1e-5


@pytest.mark.parametrize("weights", ["slim", "target"])
@torch.no_grad()
def test_it_is_applied_to_a_dense_tower_and_taken_off(
    backbone: Backbone, result: PruneResult, directory: Path, weights: Any
) -> None:
    tower, images = deepcopy(backbone.tower), pictures(backbone)
    before, state = tower(images), dict(tower.named_parameters())
    applied = ovsprune.apply(tower, ovsprune.read(directory), weights=weights)
    found = tower(images)
    with pytest.raises(TargetError, match="slim already|detach a slim tower"):
        ovsprune.apply(tower, ovsprune.read(directory))
    applied.detach()
    assert torch.equal(tower(images), before)
    assert all(p is state[name] for name, p in tower.named_parameters())
    wanted = result.tower(images)
    assert far(found, wanted) < 1e-4 < 1e-2 < far(before, wanted)


def test_a_state_dict_is_cut_by_its_mask(backbone: Backbone, directory: Path) -> None:
    checkpoint = ovsprune.read(directory)
    stored = checkpoint.tower()
    found = cut_state(backbone.tower.state_dict(), checkpoint.spec, checkpoint.mask)
    assert all(torch.equal(found[name], stored[name]) for name in found)


@pytest.mark.parametrize(
    "recovery", ["bias", "closed-form", "closed-form-symmetric", "gauss-newton"]
)
def test_a_plan_that_keeps_everything_changes_no_bit(
    backbone: Backbone, case: Case, recovery: str
) -> None:
    after = recovered(case, case.full_plan(), recovery).state_dict()
    before = case.dense.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    images, raw = pictures(backbone), deepcopy(backbone.tower)
    FAMILIES.get(backbone.family).rewrite(raw)
    assert torch.equal(case.outputs(case.dense, images), case.outputs(raw, images))


@pytest.mark.parametrize("recovery", ["closed-form", "gauss-newton", "distill"])
def test_a_repaired_tower_is_closer(case: Case, recovery: str) -> None:
    kept = dict(case.full_plan().kept)
    for group in streams_of(case):
        kept[group.name] = torch.arange(group.units - group.units // 8)
    images = case.images(8)
    wanted = case.outputs(case.dense, images)
    before = (case.outputs(case.cut(Plan(kept)), images) - wanted).norm()
    after = (case.outputs(recovered(case, Plan(kept), recovery), images) - wanted).norm()
    assert after < 0.9 * before


def test_a_projection_behind_the_blocks_is_refitted() -> None:
    """It alone, towards what it gives in the dense tower."""
    case = with_streams(lively(open_clip_vit))
    stream = streams_of(case)[0]
    plan = Plan({**case.full_plan().kept, stream.name: torch.arange(stream.units - 8)})
    slim = case.cut(plan)
    images = case.images(8)
    wanted = case.outputs(case.dense, images)
    before = (case.outputs(slim, images) - wanted).norm()
    others = {n: t.clone() for n, t in slim.state_dict().items() if n != "proj"}
    refit_readers(case.context(slim, plan))
    assert (case.outputs(slim, images) - wanted).norm() < 0.9 * before
    assert all(torch.equal(slim.state_dict()[name], tensor) for name, tensor in others.items())


def test_it_is_pruned_again(directory: Path, result: PruneResult) -> None:
    """Without the option, the stream stays as narrow as it was; with it, it may lose more."""
    given = ovsprune.backbones.load(str(directory))
    for options in ({}, asked(given)):
        again = prune(given, 0.05, recovery="closed-form", **options, **QUICK)
        assert abs(again.achieved - 0.05) <= 0.01
        for stream in result.spec.streams():
            then = again.spec.layer(stream.name)
            assert then.units == stream.units
            assert then.kept <= stream.kept if options else then.kept == stream.kept
        assert set(again.spec.interface) >= set(result.spec.interface)


def test_a_stream_is_cut_of_what_was_slim_before(tmp_path: Path) -> None:
    small = lively(open_clip_vit)
    prune(small, 0.3, recovery="none", output=tmp_path / "first", **QUICK)
    given = ovsprune.backbones.load(str(tmp_path / "first"))
    again = prune(
        given, 0.4, prune_width=True, recovery="none", output=tmp_path / "second", **QUICK
    )
    assert again.spec.interface == ("transformer.stream",)
    tower, images = deepcopy(small.tower), pictures(small)
    ovsprune.apply(tower, ovsprune.read(tmp_path / "second"), weights="target")
    with torch.no_grad():
        assert far(tower(images), again.tower(images)) < 1e-4


@pytest.mark.parametrize("make", [open_clip_vit, REPRESENTATIVES["open_clip-resnet"]])
def test_rounds_and_floors(make: Callable[[], Backbone]) -> None:
    found = pruned(make(), 0.5, rounds=2, recovery="bias", floor=("*.stream=0.8",))
    streams = [layer for layer in found.spec.layers if layer.kind in STREAM_KINDS]
    assert abs(found.achieved - 0.5) <= 0.01
    assert streams and all(layer.kept >= 0.8 * layer.units for layer in streams)


def test_protected_and_off_by_default() -> None:
    backbone = open_clip_vit()
    plain = prune(backbone, 0.3, recovery="none", **QUICK)
    assert plain.spec.format_version < 3 and not plain.spec.interface
    assert not any(layer.kind in STREAM_KINDS for layer in plain.spec.layers)
    assert not set(STREAM_KINDS.values()) & plain.spec.provenance.keys()
    with_it = pruned(backbone, 0.3, recovery="none", protect=("*.stream",))
    assert with_it.spec.layers == plain.spec.layers
    assert any(name.endswith(".stream") for name in with_it.spec.protected)


def test_a_layer_scale_goes_along() -> None:
    config = deepcopy(open_clip_vit().architecture)
    config["vision_cfg"]["ls_init_value"] = 0.5
    family: Any = FAMILIES.get("open_clip-vit")
    preprocess = open_clip_vit().preprocess

    def make() -> Backbone:
        made: Backbone = family.build(DenseModel("scaled", config, preprocess))
        return made

    small = lively(make)
    found = prune(small, 0.5, prune_width=True, **QUICK)
    kept = found.spec.layer("transformer.stream").kept
    scale: Any = found.tower.get_submodule("transformer.resblocks.0.ls_1")
    assert scale.gamma.shape == (kept,) and kept < 64


def test_norms_count_what_is_gone(narrow: Path) -> None:
    images = pictures(open_clip_vit(), 64)
    loaded, found = ovsprune.load(narrow, size=(64, 64)), ovsprune.backbones.load(str(narrow))
    for tower in (found.tower, loaded.tower):
        norms = [m for m in tower.modules() if isinstance(m, torch.nn.LayerNorm)]
        assert all(isinstance(m, CountedLayerNorm) and m.dense_width == 64 for m in norms)
        assert all(m.normalized_shape[0] < 64 for m in norms)
    with torch.no_grad():
        assert loaded.dense(images).shape == (2, 32, 8, 8)


def test_it_is_exported(narrow: Path, tmp_path: Path) -> None:
    found = export(narrow, output=tmp_path / "tower.onnx", pairs=1)
    assert found is not None


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (open_clip_vit, {"prune_stages": True}, r"do: open_clip-resnet\. Leave it out"),
        (
            REPRESENTATIVES["open_clip-resnet"],
            {"prune_width": True},
            r"--prune-width: .* families that do: open_clip-timm-vit, open_clip-vit",
        ),
        (open_clip_convnext, {"prune_stages": True}, "open_clip-convnext, which does not offer"),
        (open_clip_timm_siglip, {"prune_width": True}, "timm's attention pool takes the tokens"),
    ],
)
def test_a_family_that_cannot_says_which_can(
    make: Callable[[], Backbone], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        prune(make(), 0.3, **options, **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocation": "global"}, "--prune-width does not go with --allocation global"),
        ({"prune_head_dim": True}, "does not go with --prune-head-dim"),
        ({"uniform_heads": True}, "does not go with --uniform-heads"),
        ({"budget": "latency"}, "does not go with --budget latency"),
        (IMP, "--method imp does not take --prune-width"),
    ],
)
def test_what_it_does_not_go_with_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        prune(open_clip_vit(), 0.5, prune_width=True, **options)


def test_targets_refuse_it_before_they_touch_anything(narrow: Path, tmp_path: Path) -> None:
    checkpoint = ovsprune.read(narrow)
    model = MiniSan.with_tower(small_tower())
    before = {name: (id(t), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    message = r"another interface than its base: transformer\.stream is \d+ of 64 channels wide"
    known = {name: TARGETS.get(name) for name in TARGETS.names()}
    takers = [name for name, it in known.items() if "vit" in it.takes and not it.fallback]
    assert {"san", "mmseg-san", "clipseg"} <= set(takers)
    for name in takers:
        with pytest.raises(TargetError, match=message):
            TARGETS.get(name).attach(model, checkpoint, force=True)
        with pytest.raises(TargetError, match=message):
            TARGETS.get(name).convert(None, checkpoint, force=True)
    with pytest.raises(TargetError, match=message):
        transfer(slim=narrow, target="san", output=tmp_path / "out", force=True)
    assert not (tmp_path / "out").exists()
    after = {name: (id(t), t._version) for name, t in model.state_dict(keep_vars=True).items()}
    assert after == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "unknown field 'interface'"),
        ({"interface": []}, r"interface is \[\], expected \['transformer.stream'\]"),
        ({"interface": "all"}, "interface is 'all', expected"),
    ],
)
def test_a_config_that_does_not_own_up_is_refused(
    narrow: Path, change: dict[str, Any], message: str
) -> None:
    document = {**json.loads((narrow / "config.json").read_text()), **change}
    with pytest.raises(CheckpointError, match=message):
        SlimSpec.from_json(json.dumps(document))
    if change != {"interface": []}:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(document, schema())
