"""EfficientNets as towers of open_clip's TimmModel."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ovsprune import backbones
from ovsprune.backbones import FAMILIES
from ovsprune.backbones.open_clip_model import build_clip
from ovsprune.core.errors import OptionError, WeightsError
from ovsprune.core.records import DenseModel
from ovsprune.graph.cut import mask
from tests.contracts.conftest import LITE, open_clip_efficientnet, prepared, squeezed

FAMILY = FAMILIES.get("open_clip-efficientnet")


def write(folder: Path, config: dict[str, Any], state: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    found = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}
    (folder / "open_clip_config.json").write_text(json.dumps(found))
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tower = open_clip_efficientnet().tower.state_dict()
    return write(tmp_path / "lite", LITE, {f"visual.{k}": v for k, v in tower.items()})


def vision(**options: Any) -> dict[str, Any]:
    return {**LITE, "vision_cfg": {**LITE["vision_cfg"], **options}}


def test_folder_with_the_image_tower_only(folder: Path) -> None:
    loaded, expected = backbones.load_backbone(str(folder)), open_clip_efficientnet()
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(loaded.pooled(images), expected.pooled(images))
    assert (loaded.name, loaded.pretrained, loaded.trained) == ("lite", "local", True)
    assert (loaded.family, loaded.activation) == ("open_clip-efficientnet", "relu6")
    assert loaded.preprocess.size == (48, 48) and loaded.preprocess.mean == (0.5, 0.5, 0.5)
    assert not loaded.has_text and not loaded.text


def test_clip_loads_as_in_open_clip(tmp_path: Path) -> None:
    import open_clip

    model = build_clip(LITE)
    model.visual.load_state_dict(open_clip_efficientnet().tower.state_dict())
    folder = write(tmp_path / "clip", LITE, model.state_dict())
    loaded = backbones.load_backbone(str(folder))
    reference = open_clip.create_model(f"local-dir:{folder}").eval()
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = reference.encode_image(images)
    torch.testing.assert_close(loaded.pooled(images), expected, atol=1e-6, rtol=1e-5)
    assert loaded.encode_text(["a cat"]).shape == (1, 24)
    assert set(loaded.text) == {k for k in model.state_dict() if not k.startswith("visual.")}


def test_pooled_output_is_the_mean_of_the_dense_output() -> None:
    for projection in ("linear", "none", ""):
        tower = FAMILY.build(
            DenseModel("x", vision(timm_proj=projection), open_clip_efficientnet().preprocess)
        )
        images = torch.randn(2, 3, 48, 32)
        pooled, dense = tower.pooled(images), tower.dense(images)
        torch.testing.assert_close(dense.mean((2, 3)), pooled, atol=1e-5, rtol=1e-4)
        assert dense.shape == (2, 32 if projection == "none" else 24, 6, 4)


def test_prunable_layers_are_the_expanded_channels() -> None:
    tower = open_clip_efficientnet().tower
    layers = FAMILY.prunable_layers(tower)
    blocks = list(FAMILY.stages(tower).blocks)
    assert blocks[0] == "trunk.blocks.0.0"  # depthwise separable: it has none
    assert [s.block for s in layers] == blocks[1:]
    assert {s.kind for s in layers} == {"channels"} and not any(s.protected for s in layers)
    assert [s.stream is not None for s in layers] == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({}, True),
        ({"timm_model_name": "tf_efficientnet_lite0"}, True),
        ({"timm_model_name": "mobilenetv2_050"}, True),
        ({"timm_model_name": "efficientnet_b0"}, True),  # squeeze-and-excitation everywhere
        ({"timm_model_name": "semnasnet_100"}, True),  # in some blocks
        ({"timm_model_name": "resnet18"}, False),
        ({"timm_model_name": "no_such_model"}, False),
        ({"timm_model_name": 5}, False),
        ({"timm_pool": "rot_attn"}, False),
        ({"timm_proj": "mlp"}, True),
        ({"timm_pool": "", "timm_proj": ""}, False),  # nothing is pooled
        ({"timm_model_name": "efficientnet_b3_g8_gn"}, False),  # groups of eight channels
        ({"timm_model_name": "mobilenetv3_small_100"}, False),
        ({"timm_proj": "none"}, True),
    ],
)
def test_family_takes_supported_trunks_only(options: dict[str, Any], taken: bool) -> None:
    assert FAMILY.takes(vision(**options)) is taken


def test_squeeze_and_excitation_is_reader_and_gating_layer() -> None:
    case = prepared(squeezed())
    block = "trunk.blocks.2.1"
    group = next(g for g in case.groups if g.name == block)
    readers = {f"{block}.se.conv_reduce", f"{block}.conv_pwl"}
    assert {s.module for s in group.readers} == readers
    assert group.consumer == f"{block}.conv_pwl" and group.gating_layers == (
        f"{block}.se.conv_expand",
    )
    plan = case.full_plan()
    plan.kept[block] = torch.arange(10)  # type: ignore[index]
    se, images = case.dense.get_submodule(f"{block}.se"), case.images()
    slim = case.cut(plan).get_submodule(f"{block}.se")
    read = torch.randn(2, group.units, 3, 3)
    read[:, 10:] = 0
    with torch.no_grad():
        torch.testing.assert_close(slim(read[:, :10]), se(read)[:, :10], atol=1e-6, rtol=1e-5)
    # masked for the last convolution alone, the channels still speak through the mean of all
    masked, half = deepcopy(case.dense), deepcopy(case.dense)
    mask(masked, [group], plan)
    half.get_submodule(group.consumer).weight[:, 10:] = 0
    expected = case.outputs(masked, images)
    assert (case.outputs(half, images) - expected).abs().max() > 1e-3 * expected.std()


def test_folder_of_an_unsupported_model(folder: Path) -> None:
    write(folder, vision(timm_model_name="mobilenetv3_small_100"), {"a": torch.zeros(1)})
    with pytest.raises(WeightsError, match="none of the families .*open_clip-efficientnet"):
        backbones.load_backbone(str(folder))


def test_random_weights_and_a_file(folder: Path, tmp_path: Path) -> None:
    random = backbones.load_backbone(str(folder), pretrained="none")
    assert (random.pretrained, random.trained) == (None, False)
    other = tmp_path / "other.pt"
    state = {k: v + 0 for k, v in random.tower.state_dict().items()}
    torch.save(state, other)
    read = backbones.load_backbone(str(folder), pretrained=str(other))
    assert (read.pretrained, read.trained) == ("other.pt", True)
    assert all(torch.equal(v, state[k]) for k, v in read.tower.state_dict().items())


def test_weights_that_do_not_fit(folder: Path) -> None:
    save_file({"visual.trunk.a": torch.zeros(1)}, folder / "open_clip_model.safetensors")
    with pytest.raises(
        WeightsError, match=r"not fit .*missing .*1 unexpected \(visual\.trunk\.a\)"
    ):
        backbones.load_backbone(str(folder))


def test_another_activation_is_refused(folder: Path) -> None:
    assert backbones.load_backbone(str(folder), activation="relu6").activation == "relu6"
    with pytest.raises(OptionError, match="'gelu': .* has relu6; leave it out"):
        backbones.load_backbone(str(folder), activation="gelu")
