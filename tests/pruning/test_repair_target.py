"""Repair of a framework's tower on calibration images after a cut by a mask."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ovsprune
from ovsprune.calibration.pictures import RenderedPictures
from ovsprune.core.errors import OptionError, TargetError
from ovsprune.core.protocols import Backbone
from ovsprune.targets import load_into
from tests.contracts.conftest import open_clip_vit
from tests.targets.by_hand import snapshot, unchanged

PICTURES = {"calibration": "procedural", "samples": 24}


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("slim") / "small"
    ovsprune.prune(
        open_clip_vit(),
        0.4,
        criterion="magnitude",
        allocation="uniform",
        recovery="none",
        samples=4,
        text=False,
        output=place,
    )
    return place


@pytest.fixture
def backbone() -> Backbone:
    return open_clip_vit()


def framework(backbone: Backbone) -> nn.Module:
    """Return a model that contains a finetuned tower."""
    model = nn.Module()
    model.clip = nn.Module()
    model.clip.visual = deepcopy(backbone.tower)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * parameter.std(correction=0) * noise)
    return model.eval()


@torch.no_grad()
def features(backbone: Backbone, model: nn.Module) -> Tensor:
    """Return dense features of images that are not used for calibration."""
    pictures = next(RenderedPictures(8, backbone.preprocess, 5, start=9000).batches(8))
    return backbone.stages(model.get_submodule("clip.visual")).outputs(pictures)[1]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / (wanted - wanted.mean((0, 2, 3), keepdim=True)).norm())


def test_the_repair_approximates_the_frameworks_features(slim: Path, backbone: Backbone) -> None:
    model = framework(backbone)
    before, wanted = snapshot(model), features(backbone, model)
    asked = {"weights": "target", "force": True}
    cut = ovsprune.transfer(model, slim, **asked)
    plain = error(features(backbone, model), wanted)
    cut.detach()
    repaired = ovsprune.transfer(model, slim, **asked, **PICTURES)
    assert error(features(backbone, model), wanted) < 0.8 * plain
    assert repaired.weights == "target"
    assert "repaired by closed-form on images of procedural: relative error 0." in repaired.reason
    repaired.detach()
    assert unchanged(model, before)
    assert torch.equal(features(backbone, model), wanted)


def test_a_repair_on_disk_equals_a_live_repair(
    slim: Path, backbone: Backbone, tmp_path: Path
) -> None:
    model = framework(backbone)
    torch.save({"model": model.state_dict()}, tmp_path / "tuned.pth")
    record = ovsprune.transfer(
        slim=slim,
        target="generic",
        weights="target",
        force=True,
        checkpoint=tmp_path / "tuned.pth",
        output=tmp_path / "out",
        **PICTURES,
    )
    assert record["weights"] == "target" and "repaired by closed-form" in record["reason"]
    fresh = framework(backbone)
    assert load_into(fresh, tmp_path / "out") == []
    ovsprune.transfer(model, slim, weights="target", force=True, **PICTURES)
    torch.testing.assert_close(features(backbone, fresh), features(backbone, model))


def test_slim_weights_are_not_repaired_again(slim: Path, backbone: Backbone) -> None:
    model = framework(backbone)
    before = snapshot(model)
    with pytest.raises(OptionError, match="which are repaired already; leave out calibration"):
        ovsprune.transfer(model, slim, weights="slim", force=True, **PICTURES)
    assert unchanged(model, before)


def test_a_part_of_a_tower_cannot_be_repaired(slim: Path, backbone: Backbone) -> None:
    model = framework(backbone)
    del model.clip.visual.proj
    before = snapshot(model)
    with pytest.raises(TargetError, match="has no proj, so it cannot be run alone"):
        ovsprune.transfer(model, slim, weights="target", force=True, **PICTURES)
    assert unchanged(model, before)
