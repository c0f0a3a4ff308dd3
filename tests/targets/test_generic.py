"""Models of unknown frameworks: their towers are found, and slim equals masked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ovsprune.core.errors import TargetError
from ovsprune.jobs.transfer import transfer
from ovsprune.slim import SlimAttention, SlimCheckpoint
from ovsprune.slim.cutting import cut_state
from ovsprune.targets import TARGETS, load_into
from ovsprune.targets.generic import find_towers
from ovsprune.targets.output import write_output
from tests.targets.by_hand import (
    SMALL,
    SMALL_MLP,
    error,
    lively_resnet,
    load_pictures,
    masked,
    slim_resnet,
    small_slim,
    small_tower,
    snapshot,
    unchanged,
)

BOUND = 1e-4
TARGET = TARGETS.get("generic")


class Segmenter(nn.Module):
    """Model of no known framework: a tower and a head."""

    def __init__(self, tower: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.visual = tower
        self.head = nn.Linear(width, 3)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder.visual(images))  # type: ignore[operator]
        return out


class Pooled(nn.Module):
    """Vision model of transformers with the projection of CLIPModel."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        import transformers

        self.vision_model = transformers.CLIPVisionModel(config)
        self.visual_projection = nn.Linear(config.hidden_size, SMALL["outputs"], bias=False)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.visual_projection(self.vision_model(images).pooler_output)
        return out


def open_clip_vit() -> nn.Module:
    from open_clip.transformer import QuickGELU, VisionTransformer

    return VisionTransformer(
        image_size=SMALL["size"], patch_size=SMALL["patch"], width=SMALL["width"],
        layers=SMALL["depth"], heads=SMALL["heads"], mlp_ratio=SMALL_MLP / SMALL["width"],
        output_dim=SMALL["outputs"], act_layer=QuickGELU,
    )  # fmt: skip


def transformers_vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=SMALL["width"], intermediate_size=SMALL_MLP, num_hidden_layers=SMALL["depth"],
        num_attention_heads=SMALL["heads"], image_size=SMALL["size"], patch_size=SMALL["patch"],
    )  # fmt: skip
    return Pooled(config)


def open_clip_resnet() -> nn.Module:
    from open_clip.modified_resnet import ModifiedResNet

    return ModifiedResNet([1, 1, 1, 1], 24, 4, 64, 8)


def case(name: str) -> tuple[Segmenter, SlimCheckpoint, dict[str, Tensor]]:
    """Return a model with the pruned tower's dense weights, the slim checkpoint and the tower."""
    torch.manual_seed(5)
    if name == "resnet":
        tower = lively_resnet([1, 1, 1, 1])
        model, slim, depth = Segmenter(open_clip_resnet(), 24), slim_resnet(tower), 0
    else:
        tower, depth = small_tower(), 4
        built = open_clip_vit() if name == "open_clip" else transformers_vit()
        model, slim = Segmenter(built, SMALL["outputs"]), small_slim(tower)
    layout = TARGET.layout(model.state_dict(), depth)
    values: dict[str, Tensor] = {}
    for canonical, tensor in tower.items():
        values |= layout.to_framework(canonical, tensor)
    missing, unexpected = model.load_state_dict(values, strict=False)
    assert not unexpected and all(name.startswith("head.") for name in missing)
    return model.eval(), slim, tower


CASES = pytest.mark.parametrize("name", ["open_clip", "transformers", "resnet"])


@torch.no_grad()
def run(model: nn.Module) -> dict[str, Tensor]:
    side = 64 if any("attnpool" in name for name, _ in model.named_modules()) else 32
    return {"out": model(load_pictures(2, side))}


@CASES
def test_slim_equals_dense_masked(name: str) -> None:
    model, slim, _ = case(name)
    depth = 0 if name == "resnet" else 4
    dense, before = run(model), snapshot(model)
    with masked(model, slim, TARGET.layout(model.state_dict(), depth)):
        wanted = run(model)
    with transfer(model, slim) as report:  # recognised, since no other target knows it
        assert report.target == "generic" and report.weights == "slim"
        errors = error(run(model), wanted)
        assert report.params_after < report.params_before
    assert errors["out"] <= BOUND and error(dense, wanted)["out"] > 100 * BOUND
    print(name, errors)
    assert unchanged(model, before)


@CASES
def test_report_lists_found_and_unverified_parts(name: str) -> None:
    model, slim, _ = case(name)
    with TARGET.attach(model, slim) as report:
        first, last = report.notes[0], report.notes[-1]
        assert first.startswith("found: a tower") and "encoder.visual" in first
        assert last.startswith("not verified: other code that reads inside the tower")
        assert all(note in str(report) for note in report.notes)
        assert report.trainable == ("encoder.visual.*",)


@CASES
def test_round_trip_on_disk(tmp_path: Path, name: str) -> None:
    model, slim, _ = case(name)
    converted = TARGET.convert(model.state_dict(), slim)
    assert converted.weights == "slim"
    assert converted.replaced.keys() | converted.kept.keys() == model.state_dict().keys()
    write_output(tmp_path / "out", converted, {"target": "generic"}, "")
    fresh = case(name)[0]
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    assert load_into(fresh, tmp_path / "out") == []
    with TARGET.attach(model, slim):
        state = fresh.state_dict()
        assert list(state) == list(model.state_dict())
        assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_parts_that_were_stripped_are_named() -> None:
    model, slim, _ = case("open_clip")
    visual: Any = model.encoder.visual
    visual.proj, visual.ln_post = None, nn.Identity()
    with TARGET.attach(model, slim) as report:
        assert "not found: ln_post, proj" in report.notes
        assert isinstance(visual.transformer.resblocks[0].attn, SlimAttention)


def test_finetuned_tower_is_cut_by_the_mask() -> None:
    model, slim, tower = case("transformers")
    layout = TARGET.layout(model.state_dict(), 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    tuned = {name: tensor * 1.05 for name, tensor in tower.items()}
    with TARGET.attach(model, slim) as report:
        assert report.weights == "target"
        found = layout.tower_state(model.state_dict())
        wanted = cut_state(tuned, slim.spec, slim.mask)
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_text_towers_are_not_taken_for_image_towers() -> None:
    import open_clip

    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 4, "layers": 4}
    vision = {"image_size": 32, "layers": 4, "width": 32, "head_width": 8, "patch_size": 8}
    clip = open_clip.CLIP(16, vision, text)
    found = find_towers(clip.state_dict())
    assert [(tower.path, tower.kind) for tower in found] == [("visual", "vit")]


def test_several_towers_are_named() -> None:
    model, slim, _ = case("open_clip")
    model.teacher = open_clip_vit()
    before = snapshot(model)
    with pytest.raises(
        TargetError, match=r"has 2 towers of the kind vit \(encoder.visual, teacher\)"
    ):
        TARGET.attach(model, slim)
    assert unchanged(model, before)
    TARGET.attach(model.encoder, slim).detach()


def test_without_a_tower_and_without_a_checkpoint() -> None:
    with pytest.raises(TargetError, match="Linear is not a model with a CLIP tower .*prefix_map"):
        TARGET.attach(nn.Linear(2, 2), small_slim())
    with pytest.raises(TargetError, match="to locate the tower; give one"):
        TARGET.convert(None, small_slim())
    model, _, _ = case("resnet")
    with pytest.raises(TargetError, match="Segmenter is not a model with a CLIP tower"):
        TARGET.attach(model, small_slim())


def test_wrong_activation_is_refused() -> None:
    model, slim, _ = case("open_clip")
    visual: Any = model.encoder.visual
    for block in visual.transformer.resblocks:
        block.mlp.gelu = nn.GELU()
    with pytest.raises(TargetError, match="is gelu, but .* was pruned with quick_gelu"):
        TARGET.attach(model, slim)
