"""Folders of open_clip's form as models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ovsprune import backbones
from ovsprune.backbones.open_clip_model import build_clip
from ovsprune.core.errors import WeightsError
from ovsprune.jobs.prune import prune
from ovsprune.slim.config import dump
from tests.contracts.conftest import open_clip_vit


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "mine"
    made.mkdir()
    config = {
        "model_cfg": dict(open_clip_vit().architecture),
        "preprocess_cfg": {"resize_mode": "squash", "mean": [0.5, 0.5, 0.5]},
    }
    (made / "open_clip_config.json").write_text(json.dumps(config))
    model = build_clip(config["model_cfg"])
    state = {k: torch.randn_like(v) * 0.05 for k, v in model.state_dict().items()}
    save_file({k: v.half() for k, v in state.items()}, made / "open_clip_model.safetensors")
    return made


def test_folder_loads_as_in_open_clip(folder: Path) -> None:
    import open_clip

    loaded = backbones.load_backbone(str(folder))
    reference = open_clip.create_model(f"local-dir:{folder}").eval()
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = reference.encode_image(images)
    torch.testing.assert_close(loaded.pooled(images), expected, rtol=1e-5, atol=1e-6)
    assert (loaded.name, loaded.pretrained, loaded.trained) == ("mine", "local", True)
    assert loaded.preprocess.resize_mode == "squash"
    assert loaded.preprocess.mean == (0.5, 0.5, 0.5)
    assert loaded.has_text


def test_image_tower_only_has_no_text(folder: Path) -> None:
    weights = folder / "open_clip_model.safetensors"
    clip = backbones.load_backbone(str(folder))
    save_file(
        {f"visual.{k}": v.clone() for k, v in clip.tower.state_dict().items()},
        weights,
    )
    bare = backbones.load_backbone(str(folder))
    images = torch.randn(1, 3, 48, 48)
    assert torch.equal(bare.dense(images), clip.dense(images))
    assert not bare.has_text
    with pytest.raises(WeightsError, match="without a text tower"):
        bare.encode_text(["a cat"])


def test_pruned_folder_loads_again(folder: Path, tmp_path: Path) -> None:
    done = prune(str(folder), 0.5, samples=4, criterion="magnitude", allocation="uniform",
                 recovery="none", output=tmp_path / "slim")  # fmt: skip
    assert done.spec.base.model == "mine"
    assert str(folder) not in dump(done.spec)  # no path of this machine
    slim = backbones.load_backbone(str(tmp_path / "slim"))
    assert slim.name == "mine"


def test_a_folder_without_weights(folder: Path) -> None:
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"no weights.*open_clip_model\.safetensors"):
        backbones.load_backbone(str(folder))


@pytest.mark.parametrize("text", ["{", "[]", '{"model_cfg": {"embed_dim": 3}}'])
def test_folder_with_a_malformed_configuration(folder: Path, text: str) -> None:
    (folder / "open_clip_config.json").write_text(text)
    with pytest.raises(WeightsError, match="no configuration of open_clip's"):
        backbones.load_backbone(str(folder))


def test_folder_of_an_unsupported_model(folder: Path) -> None:
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"] = {"timm_model_name": "resnet18"}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="none of the families"):
        backbones.load_backbone(str(folder))


@pytest.mark.parametrize("pretrained", ["none", "weights.safetensors"])
def test_other_weights_use_the_preprocessing_of_the_folder(folder: Path, pretrained: str) -> None:
    if pretrained != "none":
        pretrained = str((folder / "open_clip_model.safetensors").rename(folder / pretrained))
    loaded = backbones.load_backbone(str(folder), pretrained=pretrained)
    assert loaded.preprocess.resize_mode == "squash" and loaded.preprocess.mean == (0.5, 0.5, 0.5)
