"""Schedules of frameworks' models, and the command ``schedule``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import ovsprune
from ovsprune.cli.main import main
from ovsprune.core.errors import OptionError, TargetError
from tests.targets.by_hand import needs_mmseg


def test_command_shows_trained_layers_and_cost(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    options = ["--model", "tiny", "--total-steps", "100", "--json", str(out)]
    done = CliRunner().invoke(main, ["schedule", *options], standalone_mode=False)
    assert done.exit_code == 0, done.output
    record = json.loads(out.read_text())
    assert sum(layer["trains"] for layer in record["layers"]) == 13 and len(record["layers"]) == 25
    flops = record["training_flops"]
    assert flops["step"] == flops["forward"] + flops["activations"] + flops["weights"]
    assert flops["total"] == 100 * flops["step"] < flops["all"]
    tower = tiny_tower()
    assert set(record["trainable"]) | set(record["frozen"]) == set(dict(tower.named_parameters()))
    assert "13 of 25 layers train" in done.output


def tiny_tower() -> nn.Module:
    from ovsprune.backbones import load_backbone

    return load_backbone("tiny").tower


def test_flops_of_a_meta_copy_equal_those_of_the_tower() -> None:
    from ovsprune.jobs.schedule import plan_tower

    record = plan_tower("tiny", "last-k", count=3, batch_size=2)
    tower = tiny_tower()
    plan = ovsprune.schedule(tower, "last-k", count=3)
    images = torch.zeros(2, 3, *tower.image_size)
    counted = plan.training_flops(lambda: tower(images).square().mean()).record()
    told = record["training_flops"]
    assert counted == {name: told[name] for name in counted}


def test_steps_are_measured_against_training_all_layers() -> None:
    from ovsprune.jobs.schedule import plan_tower

    rows = plan_tower("tiny", "last-k", count=1, batch_size=1, measure=True)["measured"]
    assert [row["policy"] for row in rows] == ["last-k", "all"]
    assert all(row["step_seconds"] > 0 for row in rows) and rows[1]["speedup"] == 1
    if rows[0]["peak_memory"] is not None:  # gradients and AdamW's state of one layer, not of all
        assert rows[0]["peak_memory"] < rows[1]["peak_memory"]


def test_bad_options_are_refused() -> None:
    from ovsprune.jobs.schedule import plan_tower

    with pytest.raises(OptionError, match="--model is missing"):
        plan_tower(None)
    with pytest.raises(OptionError, match="--batch-size 0 must be 1 or more"):
        plan_tower("tiny", batch_size=0)
    with pytest.raises(TargetError, match="Linear is no model of mmsegmentation"):
        ovsprune.schedule(nn.Linear(3, 3), target="mmseg-san")
    listed = CliRunner().invoke(main, ["schedule", "--list"], standalone_mode=False)
    assert "alpha-progressive" in listed.output and "adapters-only" in listed.output


@pytest.fixture
def clipseg() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPSegConfig(
        text_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "vocab_size": 99, "max_position_embeddings": 16,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5,
            "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
        },
        projection_dim=24, reduce_dim=16, extract_layers=[1, 2, 4], decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.CLIPSegForImageSegmentation(config).train()


def clipseg_loss(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    output = model(
        pixel_values=torch.randn(2, 3, 32, 32),
        conditional_embeddings=torch.randn(2, 24),
    )
    return output.logits.square().mean()


@pytest.mark.framework
def test_gradients_of_a_frozen_tower_are_enabled_while_it_trains(clipseg: Any) -> None:
    before = {n: p.requires_grad for n, p in clipseg.named_parameters()}
    plan = ovsprune.schedule(clipseg, "last-k", count=12)
    tower = ("clip.vision_model.", "clip.visual_projection.")
    assert plan.layers and all(layer.name.startswith(tower) for layer in plan.layers)
    chosen = [name for name in plan.chosen if ".layers." in name and ".4." not in name]
    clipseg_loss(clipseg).backward()
    parameters = dict(clipseg.named_parameters())
    assert chosen and all(parameters[name].grad is not None for name in chosen)
    assert all(parameters[n].grad is None for n in plan.frozen)
    assert parameters["decoder.film_mul.weight"].grad is not None  # outside the pool, as ever

    clipseg.eval()
    held = clipseg.clip.vision_model(pixel_values=torch.randn(1, 3, 32, 32)).last_hidden_state
    with torch.no_grad():
        assert not clipseg_loss(clipseg).requires_grad
    assert held.requires_grad  # the framework's no_grad, not ours, decides outside training
    plan.release()
    clipseg.train().zero_grad()
    assert {n: p.requires_grad for n, p in clipseg.named_parameters()} == before
    clipseg_loss(clipseg).backward()
    assert all(p.grad is None for n, p in parameters.items() if n.startswith(tower))


@pytest.mark.framework
def test_pool_of_san_is_its_image_tower() -> None:
    needs_mmseg()
    from ovsprune.targets import TARGETS
    from ovsprune.targets.mmseg_build import SanShape, build_san

    tower = tiny_tower()
    shape = SanShape.small(tower.state_dict(), heads=4, size=96, activation="gelu")
    model = build_san(["cat", "dog"], shape)
    plan = ovsprune.schedule(model, "all")
    roots = tuple(TARGETS.get("mmseg-san").towers(model).values())
    assert {layer.name.split(".layers.")[0] + ".layers" for layer in plan.layers} >= set(roots)
    assert not any("side_adapter" in n or "text_encoder" in n for n in plan.chosen)
    groups = plan.groups(1.0, multipliers={"image_encoder.*": 0.1})
    assert {group["lr"] for group in groups} == {0.1, 1.0}
