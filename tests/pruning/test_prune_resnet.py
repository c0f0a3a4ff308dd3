"""Prune of a residual network, whose groups share convolutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ovsprune
from ovsprune import backbones
from ovsprune.backbones import FAMILIES
from ovsprune.comparison.methods import parse_method
from ovsprune.comparison.runner import ComparisonRunner
from ovsprune.core.distillation import Distillation
from ovsprune.core.progress import Silent
from ovsprune.core.records import DenseModel, Preprocess
from ovsprune.graph.costs import count_costs
from ovsprune.jobs.benchmark import benchmark
from ovsprune.jobs.inspect import inspect
from ovsprune.jobs.prune import PruneResult, prune
from ovsprune.profiling import latency
from ovsprune.pruning.config import PruneConfig
from tests.contracts.conftest import RESNET, open_clip_resnet
from tests.pruning.test_prune_convolutions import as_the_width

QUICK: dict[str, Any] = {"samples": 6, "batch_size": 4, "probe": 2}
CHEAP: dict[str, Any] = {"criterion": "magnitude", "allocation": "uniform", "recovery": "none"}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> PruneResult:
    place = tmp_path_factory.mktemp("slim") / "resnet"
    return prune(open_clip_resnet(), 0.5, output=place, **QUICK)


def images(count: int = 2, size: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one - other).abs().max() / other.std() < 1e-4


def test_the_ratio_counts_shared_costs(pruned: PruneResult) -> None:
    dense = open_clip_resnet().tower
    assert repr(pruned.tower) != repr(dense)
    assert list(pruned.tower.state_dict()) == list(dense.state_dict())
    assert abs(pruned.achieved - 0.5) < 0.002  # not 0.01: the products are counted
    assert count_costs(pruned.tower, (64, 64)) == pruned.spec.slim
    assert pruned.spec.dense == count_costs(dense, (64, 64))
    assert pruned.spec.activation == "relu"
    for name in ("layer1.1", "layer4.0"):
        first, second = (pruned.plan.width(f"{name}.conv{i}") for i in (1, 2))
        block = pruned.tower.get_submodule(name)
        assert block.conv2.weight.shape == (second, first, 3, 3) and block.conv2.bias is None
        assert block.bn2.num_features == second and block.act3.inplace


@torch.no_grad()
def test_the_checkpoint_loads_bit_for_bit_with_equal_outputs(pruned: PruneResult) -> None:
    assert pruned.path is not None
    tower, back = ovsprune.load(pruned.path), backbones.load_backbone(str(pruned.path))
    assert type(tower.tower).__module__ == "ovsprune.slim.resnet"
    state = pruned.tower.state_dict()
    for one in (tower.tower, back.tower):
        assert all(torch.equal(v, state[k]) for k, v in one.state_dict().items())
    assert torch.equal(back.pooled(images()), pruned.tower(images()))
    close(tower(images()), pruned.tower(images()))
    close(tower.dense(images()), back.dense(images()))
    assert tower.dense(images(1, 96)).shape == (1, 24, 3, 3)


@torch.no_grad()
@pytest.mark.parametrize("weights", ["slim", "target"])
def test_a_model_of_open_clip_is_slimmed_and_restored(pruned: PruneResult, weights: Any) -> None:
    dense = open_clip_resnet().tower
    before = dense(images())
    applied = ovsprune.apply(dense, ovsprune.read(pruned.path), weights=weights)
    assert count_costs(dense, (64, 64)) == pruned.spec.slim
    if weights == "slim":
        assert torch.equal(dense(images()), pruned.tower(images()))
    applied.detach()
    assert torch.equal(dense(images()), before)


def test_recovery_helps() -> None:
    """Compare plans and errors with and without recovery, on enough images for 3 x 3 patches."""
    options = {**QUICK, "samples": 24, "criterion": "magnitude", "allocation": "uniform"}
    bare, repaired = (
        prune(open_clip_resnet(), 0.5, **options, recovery=name) for name in ("none", "closed-form")
    )
    assert all(torch.equal(repaired.plan.kept[n], k) for n, k in bare.plan.kept.items())
    assert repaired.fidelity.relative_error < 0.8 * bare.fidelity.relative_error


def test_a_text_tower_keeps_its_own_gelu(tmp_path: Path) -> None:
    """Read the activation of the text tower from the architecture; the image tower has ReLU."""
    config = {**RESNET, "quick_gelu": True}
    from ovsprune.backbones.open_clip_model import build_clip

    text = {k: v for k, v in build_clip(config).state_dict().items() if k.split(".")[0] != "visual"}
    backbone = FAMILIES.get("open_clip-resnet").build(
        DenseModel("resnet", config, Preprocess((64, 64)), text=text)
    )
    backbone.tower.load_state_dict(open_clip_resnet().tower.state_dict())
    prune(backbone, 0.3, output=tmp_path / "clip", **QUICK, **CHEAP)
    model, _, _ = ovsprune.load_open_clip(tmp_path / "clip")
    assert {type(m).__name__ for m in model.transformer.modules()} >= {"QuickGELU"}
    tokens = torch.randint(0, 49407, (2, 8))
    with torch.no_grad():
        whole = build_clip(config)
        torch.testing.assert_close(model.encode_text(tokens), whole.encode_text(tokens))
        assert model.encode_image(images()).shape == (2, 24)


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "bn-scale", "allocation": "global", "recovery": "none"},
        pytest.param(
            {"criterion": "lamp", "allocation": "isomorphic", "recovery": "bias"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"criterion": "fpgm", "allocation": "spectral", "recovery": "none"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"criterion": "taylor", "allocation": "global", "recovery": "none"},
            marks=pytest.mark.slow,
        ),
        {"budget": "params", "recovery": "none"},
        pytest.param({"budget": "latency", **CHEAP}, marks=pytest.mark.slow),
        {**CHEAP, "round_to": 4},
        pytest.param(
            {"rounds": 2, "recovery": "closed-form", "criterion": "magnitude"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"recovery": "distill", "distill": Distillation(steps=2), "allocation": "uniform"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"method": "imp", "imp_structured": True, "imp_steps": 1, "recovery": "none"},
            marks=pytest.mark.slow,
        ),
        {"protect": ("*.conv1",), **CHEAP},
    ],
    ids=lambda options: "-".join(str(v) for v in options.values()),
)
def test_every_criterion_allocation_and_recovery_runs(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(latency, "_measured", as_the_width)
    # The attention pool has most of the parameters of so small a network.
    ratio = {"protect": 0.2, "budget": 0.1}.get(next(iter(options)), 0.3)
    done = prune(open_clip_resnet(), ratio, **{**QUICK, "probe": None, **options})
    assert abs(done.achieved - ratio) <= 0.01
    with torch.no_grad():
        assert done.tower(images()).isfinite().all()
    if "round_to" in options:
        assert all(int(kept.numel()) % 4 == 0 for kept in done.plan.kept.values())
    assert not any(type(m).__name__ == "FoldedNorm" for m in done.tower.modules())


def test_statistics_serve_another_ratio(tmp_path: Path) -> None:
    options = {**QUICK, "recovery": "none", "statistics": str(tmp_path / "s.safetensors")}
    prune(open_clip_resnet(), 0.3, **options)
    kept = prune(open_clip_resnet(), 0.5, **options)
    fresh = prune(open_clip_resnet(), 0.5, **QUICK, recovery="none")
    assert all(torch.equal(kept.plan.kept[n], k) for n, k in fresh.plan.kept.items())


def test_inspect_and_benchmark(pruned: PruneResult) -> None:
    layers = inspect(pruned.path)["layers"]
    assert [layer["name"] for layer in layers][:2] == ["layer1.0.conv1", "layer1.0.conv2"]
    assert all(layer["kind"] == "channels" and layer["kept"] <= layer["units"] for layer in layers)
    directory = str(pruned.path)
    found = benchmark(directory, against=directory, pairs=1, batch_sizes=(1,), memory=False)
    assert {row["macs"] for row in found["rows"]} == {pruned.spec.slim.macs}


def test_evaluate_reads_the_dense_output(pruned: PruneResult, tmp_path: Path) -> None:
    from ovsprune.jobs.evaluate import evaluate

    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    Image.fromarray(pixels[..., 0] % 2).save(tmp_path / "labels" / "a.png")
    (tmp_path / "classes.json").write_text('{"void": null, "classes": {"0": "cat", "1": "dog"}}')
    np.savez(tmp_path / "text.npz", names=np.array(["cat", "dog"]), emb=np.eye(2, 24))
    found = evaluate(
        str(pruned.path), tmp_path, text_embeddings=tmp_path / "text.npz", progress=Silent()
    )
    assert 0 <= found["miou"] <= 1 and found["images"] == 1


@pytest.mark.parametrize(
    "name", ["torch-pruning+closed-form", pytest.param("torch-pruning", marks=pytest.mark.slow)]
)
def test_torch_pruning_methods_run(name: str) -> None:
    class Scorer:
        def score(self, tower: torch.nn.Module, label: str) -> dict[str, float]:
            with torch.no_grad():
                return {"finite": float(tower(images()).isfinite().all())}

    settings = PruneConfig(ratio=0.3, samples=4, batch_size=4)
    contest = ComparisonRunner(open_clip_resnet(), settings, Scorer(), Silent())  # type: ignore[arg-type]
    row = contest.row(parse_method(name), 0.3, 0)
    assert row["status"] == "done" and row["finite"] == 1.0
    assert abs(row["achieved"] - 0.3) <= 0.01
