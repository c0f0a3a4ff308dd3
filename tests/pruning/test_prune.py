"""Prune: budgets, reproducibility, output, and errors."""

from __future__ import annotations

import dataclasses
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import ovsprune
from ovsprune import backbones
from ovsprune.allocation import ALLOCATIONS
from ovsprune.core.errors import BudgetError, OptionError, OutputError, UnknownNameError
from ovsprune.core.progress import Silent
from ovsprune.core.protocols import Backbone, Forward
from ovsprune.graph.costs import count_costs
from ovsprune.importance.taylor import Taylor
from ovsprune.jobs.prune import prune
from ovsprune.pruning.config import PruneConfig
from ovsprune.recovery import RECOVERIES, recovery_chain
from tests.contracts.conftest import open_clip_resnet, open_clip_vit
from tests.tiers import by_default

QUICK: dict[str, Any] = {"samples": 8, "batch_size": 8, "probe": 4}


@pytest.fixture(scope="module")
def small() -> Backbone:
    return open_clip_vit()


@pytest.fixture(scope="module")
def written(small: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("slim") / "small"
    result = prune(small, 0.5, output=output, **QUICK)
    assert result.path == output
    return output


BY_DEFAULT = {("macs", 0.6), ("params", 0.33)}


@pytest.mark.parametrize(
    ("budget", "ratio"),
    [
        pytest.param(b, r, marks=() if (b, r) in BY_DEFAULT else pytest.mark.slow)
        for b in ("macs", "params")
        for r in (0.1, 0.33, 0.5, 0.6)
    ],
)
@pytest.mark.parametrize("allocation", ALLOCATIONS.names())
def test_the_ratio_is_reached(small: Backbone, ratio: float, budget: str, allocation: str) -> None:
    quick = {**QUICK, "criterion": "magnitude", "recovery": "none"}
    result = prune(small, ratio, budget=budget, allocation=allocation, **quick)
    assert abs(result.achieved - ratio) <= 0.01
    size = small.preprocess.size
    dense, slim = count_costs(small.tower, size), count_costs(result.tower, size)
    assert (dense, slim) == (result.spec.dense, result.spec.slim)
    costs = {"macs": (dense.macs, slim.macs), "params": (dense.params, slim.params)}[budget]
    assert result.achieved == pytest.approx(1 - costs[1] / costs[0])


def test_the_same_command_gives_the_same_tensors(small: Backbone) -> None:
    first, second = (prune(small, 0.5, seed=3, **QUICK) for _ in range(2))
    assert all(torch.equal(first.plan.kept[k], second.plan.kept[k]) for k in first.plan.kept)
    one, two = first.tower.state_dict(), second.tower.state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_pruning_does_not_change_the_model(small: Backbone) -> None:
    before = {k: v.clone() for k, v in small.tower.state_dict().items()}
    prune(small, 0.6, **QUICK)
    after = small.tower.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_the_checkpoint_loads_bit_for_bit(small: Backbone, written: Path) -> None:
    result = prune(small, 0.5, **QUICK)
    checkpoint = ovsprune.read(written)
    tower = checkpoint.tower()
    state = result.tower.state_dict()
    assert set(tower) == set(state)
    assert all(torch.equal(tower[k], state[k]) for k in state)
    images = torch.randn(2, 3, 48, 48)
    again = backbones.load_backbone(str(written))
    with torch.no_grad():  # As the backbone runs: torch's attention has a path of its own there.
        expected = small.stages(result.tower).head(_run(small, result.tower, images))
    assert torch.equal(again.pooled(images), expected[0])
    assert torch.equal(again.dense(images), expected[1])
    own = ovsprune.load(written)
    torch.testing.assert_close(own(images), expected[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(own.dense(images), expected[1], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def _run(small: Backbone, tower: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    stages = small.stages(tower)
    stream = stages.stem(images)
    for block in stages.blocks.values():
        stream = block(stream)
    return stream


def test_the_whole_model_loads_as_open_clip_returns_it(small: Backbone, written: Path) -> None:
    model, _, preprocess = ovsprune.load_open_clip(written)
    texts = ["a photo of a cat", "a photo of a dog"]
    again = backbones.load_backbone(str(written))
    torch.testing.assert_close(again.encode_text(texts), small.encode_text(texts))
    from PIL import Image

    image = preprocess(Image.new("RGB", (60, 50)))
    assert image.shape == (3, 48, 48)
    torch.testing.assert_close(
        model.encode_image(image[None]), again.pooled(image[None]), atol=1e-5, rtol=1e-4
    )


def test_the_text_tower_can_be_left_out(small: Backbone, tmp_path: Path) -> None:
    prune(small, 0.5, output=tmp_path / "slim", text=False, **QUICK)
    again = backbones.load_backbone(str(tmp_path / "slim"))
    assert not again.has_text
    with pytest.raises(ovsprune.OvspruneError, match="without a text tower"):
        again.encode_text(["a cat"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_saved_and_loads(small: Backbone, tmp_path: Path, dtype: str) -> None:
    result = prune(small, 0.5, output=tmp_path / "slim", dtype=dtype, **QUICK)
    tensors = ovsprune.read(tmp_path / "slim").tensors
    assert {t.dtype for t in tensors.values()} == {getattr(torch, dtype)}
    tower = backbones.load_backbone(str(tmp_path / "slim")).tower
    for name, tensor in result.tower.state_dict().items():
        rounded = tensor.to(getattr(torch, dtype)).float()
        assert torch.equal(tower.get_parameter(name).float(), rounded), name


@pytest.mark.parametrize("dtype", by_default(["float16", "bfloat16"], {"float16"}))
def test_weights_in_half_precision_are_read_from_a_file(tmp_path: Path, dtype: str) -> None:
    """Prune in float32 from the rounded weights, for every dtype of the file."""
    kind = getattr(torch, dtype)
    whole = backbones.load_backbone("tiny")
    state = {f"visual.{k}": v for k, v in whole.tower.state_dict().items()} | dict(whole.text)
    for name, one in (("half", kind), ("float", torch.float32)):
        save_file(
            {k: v.to(kind).to(one).contiguous() for k, v in state.items()},
            tmp_path / f"{name}.safetensors",
        )
    half, full = (
        prune(
            "tiny",
            0.5,
            pretrained=str(tmp_path / f"{name}.safetensors"),
            criterion="magnitude",
            allocation="uniform",
            recovery="closed-form",
            dry_run=True,
            **QUICK,
        )
        for name in ("half", "float")
    )
    assert all(torch.equal(half.plan.kept[k], full.plan.kept[k]) for k in half.plan.kept)
    one, two = half.tower.state_dict(), full.tower.state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert {v.dtype for v in one.values()} == {torch.float32}


def test_a_tower_in_half_precision_is_pruned_in_float32(small: Backbone) -> None:
    half = dataclasses.replace(small, tower=deepcopy(small.tower).bfloat16())
    rounded = dataclasses.replace(small, tower=deepcopy(half.tower).float())
    results = [prune(one, 0.5, **QUICK) for one in (half, rounded)]
    one, two = (r.tower.state_dict() for r in results)
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert {p.dtype for p in half.tower.parameters()} == {torch.bfloat16}


def test_values_too_large_for_float16_are_refused(small: Backbone, tmp_path: Path) -> None:
    large = dataclasses.replace(small, tower=deepcopy(small.tower))
    large.tower.get_parameter("conv1.weight")[0, 0, 0, 0] = 1e5
    options: dict[str, Any] = {"recovery": "none", "criterion": "magnitude", **QUICK}
    with pytest.raises(OptionError, match=r"float16 cannot hold visual\.conv1\.weight.*1e\+05"):
        prune(large, 0.5, output=tmp_path / "slim", dtype="float16", **options)
    assert not list(tmp_path.iterdir())


def test_the_spec_records_the_provenance(small: Backbone, written: Path) -> None:
    spec = ovsprune.read(written).spec
    assert spec.base.model == "small"
    assert spec.base.trained is False
    assert spec.activation == "quick_gelu"
    assert spec.protected == ("transformer.resblocks.2.attn",)
    made = spec.provenance
    assert (made["criterion"], made["allocation"], made["recovery"]) == (
        "reconstruction",
        "sensitivity",
        "gauss-newton",
    )
    assert made["calibration_hash"].startswith("sha256:")
    assert made["samples"] == 8
    assert made["command"] == (
        "ovsprune prune --model small --ratio 0.5 --pretrained none --samples 8 --batch-size 8"
    )
    assert "small" in (written / "README.md").read_text("utf-8")


def test_synthetic_images_depend_on_the_model(small: Backbone) -> None:
    tiny = backbones.load_backbone("tiny")
    quick = {**QUICK, "criterion": "magnitude", "allocation": "uniform", "recovery": "none"}
    for model, kind in ((small, "mixed"), (tiny, "procedural")):
        left, named = (prune(model, 0.3, **quick, **c) for c in ({}, {"calibration": kind}))
        assert left.spec.provenance["calibration"] == kind
        hashes = [r.spec.provenance["calibration_hash"] for r in (left, named)]
        assert hashes[0] == hashes[1]


def test_protected_groups_are_not_cut(small: Backbone) -> None:
    result = prune(small, 0.3, protect=("*resblocks.0*",), **QUICK)
    assert not any("resblocks.0" in name for name in result.plan.kept)
    assert "transformer.resblocks.0.mlp" in result.spec.protected


def test_floors_keep_a_minimum_of_units(small: Backbone) -> None:
    result = prune(small, 0.3, floor=("*.attn=3", "*.1.mlp=0.9", "*.1.mlp=4"), **QUICK)
    widths = result.record()["widths"]
    assert min(n for name, n in widths.items() if name.endswith("attn")) >= 3
    assert widths["transformer.resblocks.1.mlp"] >= 116
    assert result.spec.provenance["floor"] == ["*.attn=3", "*.1.mlp=0.9", "*.1.mlp=4"]


@pytest.mark.parametrize("allocation", ALLOCATIONS.names())
def test_heads_can_be_uniform(small: Backbone, tmp_path: Path, allocation: str) -> None:
    options = {**QUICK, "criterion": "magnitude", "recovery": "none", "allocation": allocation}
    result = prune(small, 0.5, uniform_heads=True, output=tmp_path / "slim", **options)
    heads = {layer.name: layer.kept for layer in result.spec.layers if layer.kind == "heads"}
    blocks = len(small.stages(small.tower).blocks)
    assert len(heads) == blocks and len(set(heads.values())) == 1
    assert abs(result.achieved - 0.5) <= 0.01
    assert "--uniform-heads --" in result.spec.provenance["command"]


def test_heads_of_a_slim_model_can_be_uniform(small: Backbone, tmp_path: Path) -> None:
    options = {**QUICK, "criterion": "magnitude", "recovery": "none"}
    first = prune(small, 0.3, allocation="global", output=tmp_path / "slim", **options)
    assert len({x.kept for x in first.spec.layers if x.kind == "heads"}) > 1
    again = prune(str(tmp_path / "slim"), 0.5, uniform_heads=True, dry_run=True, **options)
    assert len({x.kept for x in again.spec.layers if x.kind == "heads"}) == 1


def test_uniform_heads_need_heads() -> None:
    with pytest.raises(OptionError, match="--uniform-heads: .* has no heads"):
        prune(open_clip_resnet(), 0.3, uniform_heads=True, **QUICK)


def test_uniform_heads_may_be_too_coarse(small: Backbone) -> None:
    with pytest.raises(BudgetError, match=r"the nearest is 0\.\d+ with .*--uniform-heads"):
        prune(small, 0.15, uniform_heads=True, protect=("*.mlp",), **QUICK)


def test_an_untrained_model_is_reported(small: Backbone) -> None:
    progress = Silent()
    prune(small, 0.5, progress=progress, **QUICK)
    assert any("random weights" in note for note in progress.notes)


@pytest.mark.parametrize(("made", "said"), [("auto", True), ("procedural", False)])
def test_a_small_number_of_synthetic_images_is_noted(
    small: Backbone, made: str, said: bool
) -> None:
    progress = Silent()
    trained = dataclasses.replace(small, trained=True)
    prune(trained, 0.5, calibration=made, criterion="random", recovery="none",
          allocation="uniform", dry_run=True, progress=progress, **QUICK)  # fmt: skip
    assert any("8 synthetic images: 1024 preserve more" in note for note in progress.notes) == said


@pytest.mark.parametrize(
    ("model", "calibration", "count"),
    [
        ("small", "auto", 1024),  # mixed
        ("small", "leaves", 1024),
        ("small", "procedural", 256),
        ("small", "photographs", 256),
        ("tiny", "auto", 256),  # its own scenes
    ],
)
def test_the_default_number_of_synthetic_images(
    small: Backbone, model: str, calibration: str, count: int
) -> None:
    named = dataclasses.replace(small, name=model)
    settings = PruneConfig(ratio=0.5, calibration=calibration).for_model(named)
    assert (settings.pictures, settings.probe_pictures) == (count, 32)
    assert dataclasses.replace(settings, samples=48).pictures == 48


def test_a_dry_run_writes_nothing(small: Backbone, tmp_path: Path) -> None:
    result = prune(small, 0.5, output=tmp_path / "slim", dry_run=True, **QUICK)
    assert result.path is None
    assert not list(tmp_path.iterdir())
    assert result.record()["output"] is None


def test_an_existing_output_is_refused_before_any_work(
    small: Backbone, written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["ovsprune.jobs.prune"], "Pipeline", None)
    with pytest.raises(OutputError, match="exists already.*--overwrite"):
        prune(small, 0.5, output=written, **QUICK)


def test_a_full_disk_leaves_nothing(
    small: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    # By name: the package's ``write`` is the function, not its module.
    monkeypatch.setattr(sys.modules["ovsprune.slim.write"], "save_file", full)
    with pytest.raises(OutputError, match="could not be written: .*No space left"):
        prune(small, 0.5, output=tmp_path / "slim", **QUICK)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_ratios_outside_the_open_interval(small: Backbone, ratio: float) -> None:
    with pytest.raises(OptionError, match=r"outside \(0, 1\)"):
        prune(small, ratio)


def test_a_budget_out_of_reach(small: Backbone) -> None:
    with pytest.raises(BudgetError, match=r"0\.990 of the macs is out of reach.*at most 0\.\d+"):
        prune(small, 0.99, **QUICK)


def test_steps_too_coarse_for_the_ratio(small: Backbone) -> None:
    with pytest.raises(BudgetError, match=r"cannot be met within 0\.01: the nearest is"):
        prune(small, 0.05, round_to=64, protect=("*.attn",), **QUICK)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": "time"}, "--budget 'time' is unknown"),
        ({"round_to": 0}, "--round-to 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"protect": "*.attn"}, "--protect '\\*.attn': give a list"),
        ({"floor": "*.mlp=4"}, "--floor '.*': give a list"),
        ({"round_to": 8.0}, "--round-to 8.0: give a whole number"),
        ({"seed": 2**64}, "--seed .*: give a whole number from 0"),
        ({"rounds": 0}, "--rounds 0: give at least 1"),
        ({"distill_steps": 0}, "--distill-steps 0: give at least 1"),
        ({"distill_seconds": 0.0}, "--distill-seconds 0: give a finite number"),
        ({"distill_lr": float("nan")}, "--distill-lr nan: give a finite number"),
        ({"distill": {"lr": 1e-3}}, "--distill-lr goes with --recovery distill only"),
        ({"criterion": Taylor(), "statistics": "file"}, "--statistics keeps the rankings"),
        ({"seed": -1}, "--seed -1"),
        ({"ridge": 0.0}, "ridge 0"),
        ({"probe": 0}, "probe 0"),
        ({"threads": 0}, "--threads 0"),
        ({"dtype": "int8"}, "--dtype 'int8' is unknown"),
        ({"samples": 0}, "--samples 0"),
        ({"protect": ("nothing.*",)}, "matches no group"),
        ({"protect": ("*",)}, "everything is protected"),
        ({"floor": ("*.mlp",)}, "--floor '\\*.mlp': give PATTERN=N"),
        ({"floor": ("*.mlp=1.5",)}, "--floor '\\*.mlp=1.5': give PATTERN=N"),
        ({"floor": ("*.mlp=0",)}, "--floor '\\*.mlp=0': give PATTERN=N"),
        ({"floor": ("=3",)}, "--floor '=3': give PATTERN=N"),
        ({"floor": ("nothing=3",)}, "--floor 'nothing=3' matches no group that may be cut"),
        ({"floor": ("*.attn=5",)}, "0.attn has only 4 heads"),
        ({"uniform_heads": 1}, "--uniform-heads 1: give true or false"),
        ({"recovery": None}, "--recovery None: give a text"),
        ({"distill_lr": "x"}, "--distill-lr 'x': give a number"),
    ],
)
def test_bad_options_are_named(small: Backbone, options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        prune(small, 0.5, **options)


def test_an_unknown_option_lists_the_closest(small: Backbone) -> None:
    with pytest.raises(UnknownNameError, match="unknown option 'criterio'.*Did you mean 'criter"):
        prune(small, 0.5, criterio="x")
    with pytest.raises(OptionError, match="--ratio is missing"):
        prune(small)


def test_an_unknown_optimiser_lists_the_closest(small: Backbone) -> None:
    with pytest.raises(UnknownNameError, match="unknown optimizer 'AdamV'.*Did you mean 'Adam"):
        prune(small, 0.5, distill_optimizer="AdamV")


def test_recoveries_that_depend_on_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(RECOVERIES.get("gauss-newton")), "after", "distill")
    with pytest.raises(ValueError, match="depend on each other: distill after gauss-newton"):
        recovery_chain("distill")


def test_training_is_recorded(small: Backbone, tmp_path: Path) -> None:
    options: dict[str, Any] = {"recovery": "distill", "distill_steps": 2, "distill_lr": 2e-4}
    result = prune(small, 0.5, output=tmp_path / "slim", **options, **QUICK)
    made = result.spec.provenance
    optimizer = "Muon" if hasattr(torch.optim, "Muon") else "AdamW"
    assert (made["distill_steps"], made["distill_optimizer"]) == (2, optimizer)
    assert "--recovery distill" in made["command"]
    assert made["command"].endswith("--distill-steps 2 --distill-lr 0.0002")
    card = (tmp_path / "slim" / "README.md").read_text("utf-8")
    assert "without gradient steps" not in card and "were trained" in card
    again = backbones.load_backbone(str(tmp_path / "slim")).tower.state_dict()
    assert all(torch.equal(again[k], v) for k, v in result.tower.state_dict().items())


def test_without_training_none_is_recorded(small: Backbone, written: Path) -> None:
    assert not any("distill" in key for key in ovsprune.read(written).spec.provenance)
    assert "without gradient steps" in (written / "README.md").read_text("utf-8")


@pytest.mark.parametrize("kind", ["criterion", "allocation", "recovery"])
def test_unknown_names_list_the_closest(small: Backbone, kind: str) -> None:
    known = {"criterion": "magnitude", "allocation": "uniform", "recovery": "closed-form"}[kind]
    with pytest.raises(UnknownNameError, match=f"unknown {kind}.*Did you mean '{known}'"):
        prune(small, 0.5, **{kind: known[:-1]})  # type: ignore[arg-type]


def test_a_custom_criterion(small: Backbone, tmp_path: Path) -> None:
    seen = []

    def loss(forward: Forward, images: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(len(images))
        return forward(images)[0].square().sum(1)

    output = tmp_path / "slim"
    result = prune(small, 0.5, criterion=Taylor(loss), output=output, seed=2, **QUICK)
    assert sum(seen) == 8
    assert result.record()["criterion"] == "Taylor"
    made = ovsprune.read(output).spec.provenance
    assert made["criterion"] == "Taylor"
    assert made["command"] == (
        "ovsprune prune --model small --ratio 0.5 --pretrained none --samples 8 --seed 2 "
        "--batch-size 8  # criterion: Taylor, an object given from Python"
    )


class _Incomplete:
    needs = frozenset({"gradients"})

    def score(self) -> None: ...


class _Misspelt(_Incomplete):
    needs = frozenset({"moment"})


@pytest.mark.parametrize(
    ("criterion", "said"),
    [
        (Taylor, "Taylor.* is a class, not an instance"),
        (3, "criterion 3 has no method `score`. Give a name"),
        (_Misspelt(), "has needs=.*'moment'.*expected a frozenset of gradients, moments, norms"),
        (_Incomplete(), "needs gradients but has no callable `objective`"),
        (Taylor("mse"), "needs gradients but has no callable `objective`"),  # type: ignore[arg-type]
    ],
)
def test_an_invalid_criterion_is_refused(small: Backbone, criterion: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        prune(small, 0.5, criterion=criterion, **QUICK)


def test_a_criterion_without_its_inputs_is_refused(small: Backbone, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"resblocks\.0\.attn .* has no norm .*out_proj"):
        prune(small, 0.5, criterion="bn-scale", output=tmp_path / "slim", **QUICK)
    assert not list(tmp_path.iterdir())
