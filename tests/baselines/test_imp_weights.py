"""Iterative magnitude pruning of single weights: rounds and output."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ovsprune
from ovsprune import backbones
from ovsprune.baselines.imp_result import ImpResult
from ovsprune.baselines.imp_weights import imp
from ovsprune.cli.main import main
from ovsprune.core.errors import CheckpointError, OptionError, OutputError
from ovsprune.core.protocols import Backbone
from ovsprune.masks import apply_masks, read_masks, read_weights, write_masks
from tests.contracts.conftest import open_clip_resnet, open_clip_vit

QUICK: dict[str, Any] = {"samples": 6, "batch_size": 6, "imp_steps": 2}
TWO_ROUNDS = 0.19


@pytest.fixture(scope="module")
def small() -> Backbone:
    return open_clip_vit()


@pytest.fixture(scope="module")
def done(small: Backbone, tmp_path_factory: pytest.TempPathFactory) -> ImpResult:
    return imp(small, TWO_ROUNDS, output=tmp_path_factory.mktemp("imp") / "out", **QUICK)


def test_sparsity_by_round(done: ImpResult) -> None:
    total = sum(w.count for w in done.spec.weights)
    assert len(done.rounds) == 2
    for number, found in enumerate(done.rounds, start=1):
        assert abs(found.kept - total * 0.9**number) <= 1
        assert found.sparsity == 1 - found.kept / total
        assert len(found.loss) == 2
    assert done.rounds[-1].kept == sum(int(m.sum()) for m in done.masks.values())
    assert done.spec.sparsity == pytest.approx(TWO_ROUNDS, abs=1 / total)


def test_the_first_layer_is_not_ranked(small: Backbone, done: ImpResult) -> None:
    assert done.spec.excluded == ("conv1.weight",)
    assert "conv1.weight" not in done.masks
    assert (done.tower.get_parameter("conv1.weight") != 0).all()
    assert {n.rpartition(".")[2] for n in done.masks} == {"weight", "in_proj_weight"}
    assert len(done.masks) == 4 * len(small.stages(small.tower).blocks)


def test_further_weights_can_be_protected(small: Backbone) -> None:
    found = imp(small, 0.1, protect=("*.attn.*", "*.2.mlp.c_fc.weight"), **QUICK)
    assert not [n for n in found.masks if ".attn." in n]
    assert "transformer.resblocks.2.mlp.c_fc.weight" in found.spec.excluded
    with pytest.raises(OptionError, match="'nothing' matches no weight; .*conv1.weight"):
        imp(small, 0.1, protect=("nothing",), **QUICK)
    with pytest.raises(OptionError, match="everything is protected"):
        imp(small, 0.1, protect=("*",), **QUICK)


def test_masks_only_grow(small: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    import ovsprune.baselines.imp_weights as module

    seen: list[dict[str, torch.Tensor]] = []
    original = module.keep_largest

    def spy(*args: Any) -> dict[str, torch.Tensor]:
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(module, "keep_largest", spy)
    imp(small, 0.34, imp_lr=1e-2, **QUICK)
    assert len(seen) == 4
    for before, after in itertools.pairwise(seen):
        assert all(not (after[name] & ~before[name]).any() for name in after)


def test_masked_weights_are_zero(done: ImpResult) -> None:
    for name, mask in done.masks.items():
        assert (done.tower.get_parameter(name)[~mask] == 0).all()
    spec = done.spec
    zeros = sum(int((~m).sum()) for m in done.masks.values())
    assert spec.nonzero.params == spec.dense.params - zeros
    tokens, unused = 37, 0  # every ranked weight multiplies once a token
    for mask in done.masks.values():
        unused += tokens * int((~mask).sum())
    assert spec.nonzero.macs == spec.dense.macs - unused


def test_without_training_it_is_one_shot_magnitude(small: Backbone) -> None:
    for rewind in (False, True):
        found = imp(small, TWO_ROUNDS, **{**QUICK, "imp_steps": 0, "imp_rewind": rewind})
        dense = dict(small.tower.named_parameters())
        for name, after in found.tower.named_parameters():
            mask = found.masks.get(name, torch.ones_like(after, dtype=torch.bool))
            assert torch.equal(after, dense[name] * mask)
        sizes = torch.cat([dense[n].abs()[m] for n, m in found.masks.items()])
        gone = torch.cat([dense[n].abs()[~m] for n, m in found.masks.items()])
        assert gone.max() <= sizes.min()
        assert [r.loss for r in found.rounds] == [(), ()]


def test_rewinding_starts_every_round_from_the_dense_weights(
    small: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ovsprune.baselines.masked_training import MaskedTraining

    starts: list[bool] = []
    original = MaskedTraining.run

    def spy(self: MaskedTraining, masks: Any, *rest: Any) -> Any:
        own, dense = (dict(t.named_parameters()) for t in (self.student, small.tower))
        starts.append(all(torch.equal(own[n], dense[n]) for n in own))
        return original(self, masks, *rest)

    monkeypatch.setattr(MaskedTraining, "run", spy)
    imp(small, TWO_ROUNDS, imp_rewind=True, **QUICK)
    imp(small, TWO_ROUNDS, **QUICK)
    assert starts == [True, True, True, False]


def test_the_same_command_gives_the_same_tensors(small: Backbone, done: ImpResult) -> None:
    before = {k: v.clone() for k, v in small.tower.state_dict().items()}
    again = imp(small, TWO_ROUNDS, **QUICK)
    assert all(torch.equal(again.masks[n], done.masks[n]) for n in done.masks)
    one, two = again.tower.state_dict(), done.tower.state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)
    after = small.tower.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_the_output_loads_in_open_clip_and_in_ovsprune(small: Backbone, done: ImpResult) -> None:
    from ovsprune.backbones.open_clip_model import build_clip
    from ovsprune.backbones.state_file import read_state

    assert done.path is not None
    model = build_clip(small.architecture)
    model.load_state_dict(read_state(done.path / "model.safetensors"))
    images = torch.randn(2, 3, 48, 48)
    again = backbones.load_backbone(str(done.path))
    with torch.no_grad():
        assert torch.equal(model.encode_image(images), again.pooled(images))
        expected = open_clip_vit()
        expected.tower = done.tower
        assert torch.equal(again.dense(images), expected.dense(images))
    assert again.has_text and not again.trained and again.preprocess == small.preprocess
    assert {n: m.tolist() for n, m in read_masks(done.path).items()} == {
        n: m.tolist() for n, m in done.masks.items()
    }
    assert (done.path / "README.md").read_text().count("saves storage") == 1


def test_without_the_text_tower_and_in_half_precision(small: Backbone, tmp_path: Path) -> None:
    imp(small, 0.1, output=tmp_path / "x", text=False, dtype="float16", **QUICK)
    weights = read_weights(tmp_path / "x")
    assert {w.dtype for w in weights.values()} == {torch.float16}
    again = backbones.load_backbone(str(tmp_path / "x"))
    assert not again.has_text
    with pytest.raises(OptionError, match="is an unstructured result"):
        imp(again, 0.5)
    with pytest.raises(CheckpointError, match="unstructured masks, expected a slim checkpoint"):
        ovsprune.read(tmp_path / "x")


def test_masks_apply_to_another_checkpoint_in_a_framework(done: ImpResult, tmp_path: Path) -> None:
    file = write_masks(tmp_path / "imp.pth", done.masks, form="torch")
    other = open_clip_vit().tower
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.5)
    framework = nn.ModuleDict({"backbone": nn.ModuleDict({"clip": other}), "head": nn.Linear(2, 2)})
    applied = apply_masks(framework, read_masks(file))
    assert applied.placement.added == "backbone.clip"
    for name, mask in done.masks.items():
        assert torch.equal(other.get_parameter(name) == 0, ~mask)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"imp_steps": -1}, "--imp-steps -1: give at least 0"),
        ({"imp_lr": 0.0}, "--imp-lr 0"),
        ({"criterion": "random"}, "--method imp does not take --criterion"),
        ({"allocation": "uniform"}, "does not take --allocation"),
        ({"recovery": "bias"}, "does not take --recovery"),
        ({"budget": "params"}, "does not take --budget"),
        ({"round_to": 8}, "does not take --round-to"),
        ({"floor": ("*.mlp=4",)}, "does not take --floor"),
        ({"imp_structured": True}, "call ovsprune.prune"),
        ({"threads": 0}, "--threads 0"),
        ({"dtype": "int8"}, "--dtype 'int8' is unknown"),
        ({"imp_lr": float("inf")}, "--imp-lr inf: give a finite number above 0"),
    ],
)
def test_bad_options_are_named(small: Backbone, options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        imp(small, 0.5, **options)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_diverging_training_is_reported_and_nothing_is_written(
    small: Backbone, tmp_path: Path, steps: int
) -> None:
    options = {**QUICK, "imp_steps": steps, "imp_lr": 1e30}
    with pytest.raises(OptionError, match=r"diverged at step \d: take a lower --imp-lr than"):
        imp(small, 0.5, output=tmp_path / "masked", **options)
    assert not list(tmp_path.iterdir())


def test_the_default_method_takes_no_option_of_imp(small: Backbone) -> None:
    with pytest.raises(
        OptionError,
        match="--imp-rewind belongs to --method imp",
    ):
        ovsprune.prune(small, 0.5, imp_rewind=True)
    with pytest.raises(OptionError, match="--method 'lottery' is unknown; known: default, imp"):
        ovsprune.prune(small, 0.5, method="lottery")
    with pytest.raises(
        OptionError, match=r"call ovsprune.baselines.imp_weights.imp, or give imp_structured"
    ):
        ovsprune.prune(small, 0.5, method="imp")


def test_an_existing_output_is_refused_before_any_work(small: Backbone, done: ImpResult) -> None:
    with pytest.raises(OutputError, match="exists already"):
        imp(small, 0.5, output=done.path, samples=10**9)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["prune", "--model", "tiny", "--method", "imp", "--ratio", str(TWO_ROUNDS)]
    words += ["--samples", "4", "--batch-size", "4", "--imp-steps", "2", "--json", "-"]
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert not stop.value.code
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert record["output"] == str(tmp_path / "unstructured" / "tiny-r0.19")
    assert record["kind"] == "unstructured" and "no time" in record["note"]
    assert record["dense"] == record["slim"] and record["budget"] == "weights"
    assert record["nonzero"]["flops"] == 2 * record["nonzero"]["macs"]
    assert record["nonzero"]["params"] < record["dense"]["params"]
    assert [len(r["loss"]) for r in record["rounds"]] == [2, 2]
    assert record["achieved"] == pytest.approx(TWO_ROUNDS, abs=1e-4)
    said = " ".join(err.split())
    assert "saves storage" in said and "non-zero" in said and "2 rounds of 2 steps" in said
    made = json.loads((Path(record["output"]) / "config.json").read_text())["provenance"]
    assert made["command"] == (
        "ovsprune prune --model tiny --ratio 0.19 --samples 4 --batch-size 4 --method imp "
        "--imp-steps 2"
    )
    assert made["calibration_hash"].startswith("sha256:")


def test_a_residual_network_as_in_the_paper() -> None:
    """Rank all convolutions except the first, and protect the pool, as the paper does."""
    backbone = open_clip_resnet()
    options: dict[str, Any] = {"imp_steps": 0, "samples": 4, "batch_size": 4}
    found = imp(backbone, 0.5, protect=("attnpool.*",), **options)
    assert {w.name for w in found.spec.weights} == {
        f"{name}.weight"
        for name, module in backbone.tower.named_modules()
        if isinstance(module, torch.nn.Conv2d) and name != "conv1"
    }
    assert "conv1.weight" in found.spec.excluded
    weights = sum(mask.numel() for mask in found.masks.values())
    zeros = sum(int((~mask).sum()) for mask in found.masks.values())
    assert zeros == pytest.approx(0.5 * weights, abs=1)
