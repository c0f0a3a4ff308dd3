"""open_clip's ModifiedResNets: names, weights, activations, prunable layers, dense outputs."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ovsprune import backbones
from ovsprune.allocation import ALLOCATIONS
from ovsprune.allocation.shared import SharedCostAllocator
from ovsprune.allocation.trim import cost
from ovsprune.backbones import FAMILIES
from ovsprune.backbones.open_clip_model import build_clip
from ovsprune.backbones.open_clip_source import config_of
from ovsprune.core.errors import OptionError, WeightsError
from ovsprune.core.protocols import AllocationContext, Budget
from ovsprune.core.records import DenseModel, Plan, Preprocess, Scores
from ovsprune.graph.costs import count_costs
from ovsprune.graph.cut import cut, mask, removed_units
from tests.contracts.conftest import RESNET, open_clip_resnet, prepared

FAMILY = FAMILIES.get("open_clip-resnet")
NAMES = [
    f"{name}{form}" for name in ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64")
    for form in ("", "-quickgelu")
]  # fmt: skip


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_family_takes_the_resnets_of_open_clip_only() -> None:
    assert sorted(FAMILY.names()) == sorted(NAMES)
    for name in NAMES:
        takers = [key for key in FAMILIES if FAMILIES.get(key).takes(config_of(name))]
        assert takers == ["open_clip-resnet"]
    assert not FAMILY.takes(config_of("ViT-B-32"))
    assert not FAMILY.takes(config_of("convnext_base"))


@pytest.mark.parametrize("quick", [False, True])
def test_quick_gelu_applies_to_the_text_tower_only(quick: bool) -> None:
    """Check that open_clip builds the image tower with ReLU for any option."""
    model = build_clip({**RESNET, "quick_gelu": quick})
    kinds = {type(m).__name__ for m in model.modules() if not list(m.children())}
    assert ("QuickGELU" in kinds, "GELU" in kinds) == (quick, not quick)
    tower = {type(m).__name__ for m in model.visual.modules()}
    assert "ReLU" in tower and not {"GELU", "QuickGELU"} & tower


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Replace RN50 by a small model of the same name, and return weights for it."""
    real = open_clip.get_model_config
    names = {"RN50": {**RESNET}, "RN50-quickgelu": {**RESNET, "quick_gelu": True}}
    monkeypatch.setattr(
        open_clip, "get_model_config", lambda name: deepcopy(names.get(name) or real(name))
    )
    torch.manual_seed(1)
    model = build_clip(RESNET)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return {k: v + 0.05 * torch.rand(v.shape) if v.is_floating_point() else v
            for k, v in state.items()}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "activation", "quick"),
    [("RN50", None, False), ("RN50-quickgelu", None, True), ("RN50", "quick_gelu", True)],
)
def test_weights_from_a_file(
    small: dict[str, Tensor], tmp_path: Path, name: str, activation: str | None, quick: bool
) -> None:
    save_file(small, tmp_path / "rn.safetensors")
    loaded = backbones.load_backbone(
        name, pretrained=str(tmp_path / "rn.safetensors"), activation=activation
    )
    assert (loaded.family, loaded.pretrained) == ("open_clip-resnet", "rn.safetensors")
    assert loaded.trained and loaded.preprocess.size == (64, 64)
    assert (loaded.activation, loaded.architecture["quick_gelu"]) == ("relu", quick)
    model = build_clip({**RESNET, "quick_gelu": quick})
    model.load_state_dict(small)
    with torch.no_grad():
        assert torch.equal(loaded.pooled(images()), model.encode_image(images()))
        tokens = open_clip.tokenizer.SimpleTokenizer(context_length=8)(["a cat"])
        text = nn.functional.normalize(model.encode_text(tokens))
    torch.testing.assert_close(loaded.encode_text(["a cat"]), text)


def test_random_weights_and_unknown_tag(small: dict[str, Tensor]) -> None:
    random = backbones.load_backbone("RN50", pretrained="none")
    assert (random.pretrained, random.trained, random.activation) == (None, False, "relu")
    assert random.has_text and set(random.text) < set(small)
    # open_clip's own start leaves every block without effect: there would be nothing to choose by.
    assert all(b.bn3.weight.min() == 1.0 for b in random.tower.layer1)
    assert build_clip(RESNET).visual.layer1[0].bn3.weight.max() == 0.0
    with pytest.raises(
        WeightsError, match=r"'laion' is neither a file nor a tag of RN50. Tags: op"
    ):
        backbones.load_backbone("RN50", pretrained="laion")
    with pytest.raises(OptionError, match="'relu' is unknown; known: gelu, quick_gelu"):
        backbones.load_backbone("RN50", pretrained="none", activation="relu")


def test_a_folder_and_a_file_that_does_not_fit(small: dict[str, Tensor], tmp_path: Path) -> None:
    config = {"model_cfg": RESNET, "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    tower = {k: v for k, v in small.items() if k.startswith("visual.")}
    save_file(tower, tmp_path / "open_clip_model.safetensors")
    loaded = backbones.load_backbone(str(tmp_path))
    assert (loaded.family, loaded.pretrained) == ("open_clip-resnet", "local")
    assert not loaded.has_text and loaded.preprocess.mean == (0.5, 0.5, 0.5)
    assert all(torch.equal(v, tower[f"visual.{k}"]) for k, v in loaded.tower.state_dict().items())
    del tower["visual.layer1.0.bn3.weight"]
    save_file(tower, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(WeightsError, match=r"layer1\.0\.bn3\.weight"):
        backbones.load_backbone(str(tmp_path))


def test_prunable_layers_are_the_inner_convolutions() -> None:
    case = prepared(open_clip_resnet())
    blocks = list(case.backbone.stages(case.dense).blocks)
    assert blocks == ["layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0"]
    assert [g.name for g in case.groups] == [f"{b}.conv{i}" for b in blocks for i in (1, 2)]
    first, second = case.groups[4:6]
    assert [(s.module, s.axis) for s in first.slices] == [
        ("layer2.0.conv1", "out"), ("layer2.0.bn1", "out"), ("layer2.0.conv2", "in")
    ]  # fmt: skip
    assert [(s.module, s.axis) for s in second.slices] == [
        ("layer2.0.conv2", "out"), ("layer2.0.bn2", "out"), ("layer2.0.conv3", "in")
    ]  # fmt: skip
    assert [(g.consumer, g.norms) for g in (first, second)] == [
        ("layer2.0.conv2", ("layer2.0.bn1",)), ("layer2.0.conv3", ("layer2.0.bn2",))
    ]  # fmt: skip
    assert (first.kind, first.stream, first.shared) == ("channels", None, {})
    # A pair of channels is a 3 x 3 kernel, at 16 x 16 positions: it averages after it.
    assert second.shared["layer2.0.conv1"].macs == 9 * 16 * 16
    assert second.shared["layer2.0.conv1"].params == 9


def test_stream_is_the_input_of_the_last_activation() -> None:
    from ovsprune.calibration.activation_cache import capture

    case = prepared(open_clip_resnet())
    block = case.dense.get_submodule("layer1.1")
    stream = torch.rand(2, 32, 16, 16)
    taps = [("conv2", "output"), ("conv3", "output"), ("act3", "input")]
    with torch.no_grad(), capture(block, taps) as seen:
        out = block(stream)
    total = seen["conv3", "output"] + stream
    assert (total < 0).any() and (seen["conv2", "output"] < 0).any()  # not written over
    torch.testing.assert_close(seen["act3", "input"], total, atol=0, rtol=0)
    assert torch.equal(out, total.relu())


def test_dense_output_is_the_pool_of_one_position() -> None:
    """Pool an image of one position, without positional embedding."""
    backbone = open_clip_resnet()
    tower: Any = deepcopy(backbone.tower)
    stream = torch.rand(3, 256, 1, 1)
    tower.attnpool.positional_embedding = nn.Parameter(torch.zeros(2, 256))
    with torch.no_grad():
        pooled, dense = FAMILY.stages(tower).head(stream)
    torch.testing.assert_close(dense[:, :, 0, 0], pooled, atol=1e-5, rtol=1e-4)


def test_finish_restores_the_modules() -> None:
    backbone = open_clip_resnet()
    tower = deepcopy(backbone.tower)
    FAMILY.rewrite(tower)
    FAMILY.rewrite(tower)
    groups = prepared(backbone).groups
    FAMILY.finish(tower, groups, Plan({g.name: torch.arange(g.units) for g in groups}))
    assert repr(tower) == repr(backbone.tower)
    state = backbone.tower.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in tower.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RN50", "RN101", "RN50x4", "RN50x16", "RN50x64"])
def test_cut_equals_masked_for_other_resnets(name: str) -> None:
    """Test other widths, heads and sizes at half of the MACs."""
    config = config_of(name)
    config["vision_cfg"]["layers"] = [2, 2, 2, 2]
    size = (config["vision_cfg"]["image_size"],) * 2
    backbone = FAMILY.build(DenseModel(name, config, Preprocess(size)))
    generator = torch.Generator().manual_seed(0)
    for module in backbone.tower.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    case = prepared(backbone, pictures=1)
    dense = float(count_costs(case.dense, size).macs)
    ctx = AllocationContext(case.groups, Scores({}, {}), Budget("macs", dense, 0.5 * dense), None)
    widths = SharedCostAllocator(ALLOCATIONS.get("uniform")).widths(ctx)
    plan = Plan({g.name: torch.randperm(g.units, generator=generator)[: widths[g.name]]
                 .sort().values for g in case.groups})  # fmt: skip
    slim, masked = deepcopy(case.dense), deepcopy(case.dense)
    cut(slim, case.groups, plan)
    mask(masked, case.groups, plan)
    FAMILY.finish(slim, case.groups, plan)
    assert count_costs(slim, size).macs == cost(ctx, widths)
    assert abs(1 - count_costs(slim, size).macs / dense - 0.5) < 0.01
    picture = case.images(1)
    with torch.no_grad():
        expected, found = case.outputs(masked, picture), case.outputs(slim, picture)
    assert (found - expected).abs().max() / expected.std() < 1e-4
    group = case.groups[-1]
    with torch.no_grad():  # The control: one unit more is masked.
        mask(masked, [group], Plan({group.name: plan.kept[group.name][1:]}))
        assert removed_units(group, plan).numel()
        assert (found - case.outputs(masked, picture)).abs().max() / expected.std() > 1e-4
