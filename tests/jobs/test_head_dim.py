"""prune --prune-head-dim: budgets, what is written and read again, and what it does not go with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file

import ovsprune
from ovsprune import backbones
from ovsprune.core.errors import CheckpointError, OptionError, TargetError
from ovsprune.core.protocols import Backbone, Distillation
from ovsprune.graph.costs import measure
from ovsprune.jobs.inspect import inspect
from ovsprune.jobs.prune import PruneResult, prune
from ovsprune.slim.cutting import cut_state
from ovsprune.slim.spec import schema
from ovsprune.targets.check import check_directions
from tests.contracts.conftest import open_clip_vit

QUICK: dict[str, Any] = {"samples": 8, "batch_size": 8, "probe": 4}
IMP: dict[str, Any] = {"method": "imp", "imp_structured": True, "recovery": "none"}


@pytest.fixture(scope="module")
def small() -> Backbone:
    return open_clip_vit()


@pytest.fixture(scope="module")
def result(small: Backbone, tmp_path_factory: pytest.TempPathFactory) -> PruneResult:
    """No recovery, so that the slim weights are the dense ones, turned and cut."""
    output = tmp_path_factory.mktemp("slim") / "small"
    return prune(small, 0.6, prune_head_dim=True, recovery="none", output=output, **QUICK)


@pytest.fixture(scope="module")
def directory(result: PruneResult) -> Path:
    assert result.path is not None
    return result.path


@pytest.mark.parametrize("ratio", [0.1, 0.6])
@pytest.mark.parametrize("budget", ["macs", "params"])
def test_the_ratio_is_reached(small: Backbone, ratio: float, budget: str) -> None:
    found = prune(small, ratio, budget=budget, prune_head_dim=True, recovery="none", **QUICK)
    dense, slim = found.spec.dense, found.spec.slim
    assert slim == measure(found.tower, small.preprocess.size)
    gone = {"macs": 1 - slim.macs / dense.macs, "params": 1 - slim.params / dense.params}[budget]
    assert ratio - 1e-9 <= gone <= ratio + 0.01
    assert found.achieved == pytest.approx(gone)


def test_directions_were_cut_and_the_spec_says_so(result: PruneResult, directory: Path) -> None:
    spec = result.spec
    assert spec.format_version == 2
    assert spec.turned()
    for layer in spec.layers:
        if layer.kind == "heads":
            assert len({*spec.head_widths(layer)}) == 1  # What fused attention takes.
    assert set(result.bases) == {layer.name for layer in spec.turned()}
    for layer in spec.layers:
        kept = result.plan.kept[layer.name]
        if layer.kind in ("qk", "vo"):
            assert kept.tolist() == list(range(layer.kept))
            assert (layer.units, layer.unit_width, layer.slices) == (16, 1, ())
    jsonschema.validate(json.loads((directory / "config.json").read_text()), schema())
    assert spec.provenance["prune_head_dim"] is True


def test_the_command_repeats_it(result: PruneResult, directory: Path) -> None:
    assert "--prune-head-dim --" in ovsprune.read(directory).spec.provenance["command"]


def test_the_same_again_gives_the_same_tensors(small: Backbone, result: PruneResult) -> None:
    again = prune(small, 0.6, prune_head_dim=True, recovery="none", **QUICK)
    state = again.tower.state_dict()
    assert all(torch.equal(state[k], v) for k, v in result.tower.state_dict().items())
    assert all(torch.equal(again.bases[k], v) for k, v in result.bases.items())


def test_what_was_saved_is_loaded_bit_for_bit(
    small: Backbone, result: PruneResult, directory: Path, tmp_path: Path
) -> None:
    size = small.preprocess.size
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = result.tower(images)
        loaded = ovsprune.load(directory)
        found = loaded(images)
        again = backbones.load(str(directory)).pooled(images)
    stored = load_file(directory / "model.safetensors")
    state = loaded.tower.state_dict()
    assert all(torch.equal(stored[f"visual.{k}"], v) for k, v in state.items())
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(again, wanted, atol=1e-5, rtol=1e-5)
    torch.save(images, tmp_path / "images.pt")
    program = (
        "import sys, torch, ovsprune\n"
        "images = torch.load(sys.argv[2], weights_only=True)\n"
        "torch.set_num_threads(int(sys.argv[4]))\n"
        "with torch.no_grad():\n"
        "    torch.save(ovsprune.load(sys.argv[1])(images), sys.argv[3])\n"
    )
    files = [str(directory), str(tmp_path / "images.pt"), str(tmp_path / "out.pt")]
    threads = str(torch.get_num_threads())
    subprocess.run([sys.executable, "-c", program, *files, threads], check=True)
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), found)


@pytest.mark.parametrize("weights", ["slim", "target"])
def test_it_is_applied_to_a_dense_tower(
    small: Backbone, result: PruneResult, directory: Path, weights: Any
) -> None:
    """Without recovery the dense weights, turned and cut by the checkpoint, are the slim ones."""
    tower = open_clip_vit().tower
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = tower(images)
        applied = ovsprune.apply(tower, ovsprune.read(directory), weights=weights)
        found = tower(images)
        applied.detach()
        assert torch.equal(tower(images), before)
        wanted = result.tower(images)
    assert (found - wanted).abs().max() / wanted.std() < 1e-4
    assert (before - wanted).abs().max() / wanted.std() > 1e-2


def test_other_weights_of_the_architecture_take_the_bases(directory: Path) -> None:
    """Their rotated heads with nothing cut would be the same; cut they stay near."""
    tower = open_clip_vit().tower
    generator = torch.Generator().manual_seed(2)
    for parameter in tower.parameters():
        parameter.add_(0.001 * torch.randn(parameter.shape, generator=generator))
    images = torch.randn(2, 3, 48, 48, generator=generator)
    with torch.no_grad():
        ovsprune.apply(tower, ovsprune.read(directory), weights="target")
        own = tower(images)
        base = ovsprune.load(directory)(images)
    assert 0 < (own - base).norm() / base.norm() < 0.2


def test_inspect_and_the_card_show_the_widths(result: PruneResult, directory: Path) -> None:
    layers = {layer["name"]: layer for layer in inspect(directory)["layers"]}
    lost = result.spec.turned()[0]
    assert (layers[lost.name]["kept"], layers[lost.name]["units"]) == (lost.kept, 16)
    card = (directory / "README.md").read_text()
    assert f"| `{lost.name}` | {lost.kind} | {lost.kept} | 16 |" in card
    assert "directions inside heads" in card


def test_off_by_default(small: Backbone, tmp_path: Path) -> None:
    plain = prune(small, 0.5, recovery="none", output=tmp_path / "slim", **QUICK)
    assert plain.spec.format_version == 1
    assert not plain.bases
    assert {layer.kind for layer in plain.spec.layers} == {"heads", "mlp"}
    assert "prune_head_dim" not in plain.spec.provenance
    assert set(load_file(tmp_path / "slim" / "mask.safetensors")) == set(plain.plan.kept)


def test_the_closed_form_repairs_it(small: Backbone, result: PruneResult) -> None:
    repaired = prune(small, 0.6, prune_head_dim=True, **QUICK)
    assert repaired.plan.kept.keys() == result.plan.kept.keys()
    assert repaired.fidelity.relative_error < 0.8 * result.fidelity.relative_error


def test_distillation_trains_it(small: Backbone, result: PruneResult) -> None:
    trained = prune(
        small, 0.6, prune_head_dim=True, recovery="distill", distill=Distillation(2), **QUICK
    )
    assert trained.fidelity.relative_error < result.fidelity.relative_error


def test_widths_are_protected_with_their_heads_or_alone(small: Backbone) -> None:
    found = prune(
        small,
        0.3,
        prune_head_dim=True,
        recovery="none",
        protect=("*.0.attn", "*.qk"),
        floor=("*.vo=8",),
        **QUICK,
    )
    names = {layer.name.removeprefix("transformer.resblocks.") for layer in found.spec.layers}
    assert names == {"0.mlp", "1.attn", "1.attn.vo", "1.mlp", "2.mlp"}
    assert found.spec.layer("transformer.resblocks.1.attn.vo").kept >= 8
    assert "transformer.resblocks.0.attn.vo" in found.spec.protected


def test_a_round_to_is_that_of_the_widths(small: Backbone) -> None:
    found = prune(small, 0.6, prune_head_dim=True, recovery="none", round_to=8, **QUICK)
    widths = [x.kept for x in found.spec.layers if x.kind in ("qk", "vo")]
    assert widths and all(width in (8, 16) for width in widths)


def test_statistics_serve_another_ratio(small: Backbone, tmp_path: Path) -> None:
    options = {**QUICK, "prune_head_dim": True, "statistics": str(tmp_path / "s.safetensors")}
    prune(small, 0.3, recovery="none", **options)
    kept = prune(small, 0.6, recovery="none", **options)
    fresh = prune(small, 0.6, recovery="none", prune_head_dim=True, **QUICK)
    assert all(torch.equal(kept.plan.kept[n], k) for n, k in fresh.plan.kept.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"allocation": "uniform"}, "--prune-head-dim does not go with --allocation uniform"),
        ({"uniform_heads": True}, "does not go with --uniform-heads"),
        ({"budget": "latency"}, "does not go with --budget latency"),
        ({"rounds": 2}, "does not go with --rounds 2"),
        (IMP, "--method imp does not take --prune-head-dim"),
    ],
)
def test_what_it_does_not_go_with_is_refused(
    small: Backbone, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        prune(small, 0.5, prune_head_dim=True, **options)


def test_targets_refuse_it(directory: Path) -> None:
    with pytest.raises(TargetError, match=r"lost directions inside heads .* no target takes yet"):
        check_directions(ovsprune.read(directory))


def test_a_state_dict_cannot_be_cut_by_it(small: Backbone, directory: Path) -> None:
    checkpoint = ovsprune.read(directory)
    with pytest.raises(
        CheckpointError, match=r"put the checkpoint on a tower with ovsprune\.apply"
    ):
        cut_state(small.tower.state_dict(), checkpoint.spec, checkpoint.mask)
