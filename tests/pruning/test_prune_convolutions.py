"""Prune of a convolutional tower: all methods, the checkpoint, and its restoration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import ovsprune
from ovsprune import backbones
from ovsprune.baselines.imp_weights import imp
from ovsprune.comparison.methods import parse_method
from ovsprune.comparison.runner import ComparisonRunner
from ovsprune.core.distillation import Distillation
from ovsprune.core.errors import MissingLibraryError, OptionError, TargetError
from ovsprune.graph.costs import count_costs
from ovsprune.jobs.prune import PruneResult, prune
from ovsprune.profiling import latency
from ovsprune.pruning.config import PruneConfig
from ovsprune.slim import timm_tower
from tests.contracts.conftest import open_clip_efficientnet

QUICK = {"samples": 6, "batch_size": 4, "probe": 2}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> PruneResult:
    place = tmp_path_factory.mktemp("slim") / "lite"
    return prune(open_clip_efficientnet(), 0.4, output=place, **QUICK)


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def test_the_slim_tower_has_the_modules_of_the_dense_tower(pruned: PruneResult) -> None:
    dense = open_clip_efficientnet().tower
    assert [(n, type(m)) for n, m in pruned.tower.named_modules()] == [
        (n, type(m)) for n, m in dense.named_modules()
    ]
    assert list(pruned.tower.state_dict()) == list(dense.state_dict())
    assert abs(pruned.achieved - 0.4) < 0.01
    assert count_costs(pruned.tower, (48, 48)) == pruned.spec.slim
    assert pruned.spec.dense == count_costs(dense, (48, 48))


@torch.no_grad()
def test_the_checkpoint_loads_bit_for_bit(pruned: PruneResult) -> None:
    assert pruned.path is not None
    tower, back = ovsprune.load(pruned.path), backbones.load_backbone(str(pruned.path))
    assert torch.equal(tower(images()), pruned.tower(images()))
    assert torch.equal(back.pooled(images()), pruned.tower(images()))
    assert torch.equal(back.dense(images()), tower.dense(images()))
    state = pruned.tower.state_dict()
    for one in (tower.tower, back.tower):
        assert all(torch.equal(v, state[k]) for k, v in one.state_dict().items())
    assert tower.dense(torch.randn(1, 3, 64, 96)).shape == (1, 24, 8, 12)


@torch.no_grad()
def test_a_tower_of_timm_is_slimmed_and_restored(pruned: PruneResult) -> None:
    dense = open_clip_efficientnet().tower
    before = dense(images())
    checkpoint = ovsprune.read(pruned.path)
    applied = ovsprune.apply(dense, checkpoint)
    assert torch.equal(dense(images()), pruned.tower(images()))
    applied.detach()
    assert torch.equal(dense(images()), before)
    ovsprune.apply(dense, checkpoint, weights="target")
    assert count_costs(dense, (48, 48)) == pruned.spec.slim
    block = dense.get_submodule("trunk.blocks.1.0")
    width = pruned.plan.width("trunk.blocks.1.0")
    assert block.conv_dw.groups == block.conv_dw.in_channels == width


def test_another_activation_is_refused(pruned: PruneResult) -> None:
    dense = open_clip_efficientnet().tower
    for block in dense.trunk.blocks.modules():
        if isinstance(block, torch.nn.ReLU6):
            block.__class__ = torch.nn.ReLU
    with pytest.raises(TargetError, match="uses relu, the checkpoint was pruned with relu6"):
        ovsprune.apply(dense, ovsprune.read(pruned.path))


def test_without_timm_loading_says_what_is_missing(
    pruned: PruneResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(timm_tower.importlib, "import_module", refuse)
    with pytest.raises(MissingLibraryError, match=r"open_clip and timm .*ovsprune\.apply"):
        ovsprune.load(pruned.path)


def test_half_precision_keeps_integers(tmp_path: Path) -> None:
    done = prune(open_clip_efficientnet(), 0.3, output=tmp_path / "half", dtype="float16",
                 criterion="magnitude", allocation="uniform", recovery="none", **QUICK)  # fmt: skip
    slim = ovsprune.load(tmp_path / "half", dtype=torch.float32)
    counts = [k for k in done.tower.state_dict() if k.endswith("num_batches_tracked")]
    assert counts and all(slim.tower.state_dict()[k].dtype == torch.int64 for k in counts)
    with torch.no_grad():
        wanted = done.tower(images())
        assert (slim(images()) - wanted).norm() < 0.02 * wanted.norm()


def as_the_width(passes: Mapping[tuple[str, int], Any], *_: object) -> dict[tuple[str, int], float]:
    """Replace the timing of pieces by their width, so that the result is reproducible."""
    widest: dict[str, int] = {}
    for (piece, width), make in passes.items():
        make()()
        widest[piece] = max(width, widest.get(piece, 0))
    return {(piece, width): 10.0 * width / widest[piece] for piece, width in passes}


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "bn-scale", "allocation": "global"},
        pytest.param({"criterion": "bn-scale", "allocation": "isomorphic"}, marks=pytest.mark.slow),
        pytest.param({"criterion": "lamp", "allocation": "spectral"}, marks=pytest.mark.slow),
        pytest.param({"budget": "params"}, marks=pytest.mark.slow),
        pytest.param(
            {"budget": "latency", "allocation": "uniform", "criterion": "magnitude"},
            marks=pytest.mark.slow,
        ),
        {"round_to": 4, "criterion": "magnitude", "allocation": "uniform"},
        pytest.param({"rounds": 2, "recovery": "closed-form"}, marks=pytest.mark.slow),
        pytest.param(
            {"recovery": "distill", "distill": Distillation(steps=2)}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"method": "imp", "imp_structured": True, "imp_steps": 1, "recovery": "none"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda options: "-".join(str(v) for v in options.values() if isinstance(v, (str, int))),
)
def test_every_criterion_allocation_and_recovery_runs(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(latency, "_measured", as_the_width)
    ratio = 0.3
    done = prune(open_clip_efficientnet(), ratio, **{**QUICK, "probe": None, **options})
    assert abs(done.achieved - ratio) <= 0.01
    with torch.no_grad():
        assert done.tower(images()).isfinite().all()
    if "round_to" in options:
        assert all(int(kept.numel()) % 4 == 0 for kept in done.plan.kept.values())
    assert not any(type(m).__name__ == "FoldedNorm" for m in done.tower.modules())


def test_bn_scale_keeps_the_channels_of_large_scale() -> None:
    backbone = open_clip_efficientnet()
    block = backbone.tower.get_submodule("trunk.blocks.2.1")
    chosen = torch.arange(0, 64, 4)
    with torch.no_grad():
        block.bn1.weight[chosen] += 5.0
    done = prune(backbone, 0.5, criterion="bn-scale", allocation="uniform", recovery="none",
                 **QUICK)  # fmt: skip
    assert set(chosen.tolist()) <= set(done.plan.kept["trunk.blocks.2.1"].tolist())


def test_all_layers_but_one_block_can_be_protected() -> None:
    with pytest.raises(OptionError, match="everything is protected"):
        prune(open_clip_efficientnet(), 0.1, protect=("trunk.*",), **QUICK)


def test_single_weights_are_pruned_by_magnitude(tmp_path: Path) -> None:
    found = imp(open_clip_efficientnet(), 0.3, samples=4, batch_size=4, imp_steps=1,
                output=tmp_path / "masked")  # fmt: skip
    back = backbones.load_backbone(str(tmp_path / "masked"))
    assert back.family == "open_clip-efficientnet"
    with torch.no_grad():
        assert back.pooled(images()).isfinite().all()
    config = json.loads((tmp_path / "masked" / "config.json").read_text())
    assert config["kind"] == "unstructured" and found is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch-pruning", "torch-pruning+closed-form"])
def test_torch_pruning_methods_run(name: str) -> None:
    class Scorer:
        def score(self, tower: torch.nn.Module, label: str) -> dict[str, float]:
            with torch.no_grad():
                return {"finite": float(tower(images()).isfinite().all())}

    settings = PruneConfig(ratio=0.3, samples=4, batch_size=4)
    contest = ComparisonRunner(
        open_clip_efficientnet(), settings, Scorer(), ovsprune.core.progress.Silent()
    )  # type: ignore[arg-type]
    row = contest.row(parse_method(name), 0.3, 0)
    assert row["status"] == "done" and row["finite"] == 1.0
    assert abs(row["achieved"] - 0.3) <= 0.01
