"""VisionTransformers of open_clip: attentional pooling, averages, layer scale, texts of a hub."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ovsprune
from ovsprune import backbones
from ovsprune.backbones import FAMILIES
from ovsprune.backbones.open_clip_build import assemble
from ovsprune.backbones.open_clip_model import build_clip
from ovsprune.backbones.open_clip_source import other_tensors
from ovsprune.core.errors import CheckpointError, WeightsError
from ovsprune.core.protocols import Backbone
from ovsprune.core.records import DenseModel, Preprocess
from ovsprune.graph.cut import cut, mask, removed_units
from ovsprune.jobs.prune import prune
from ovsprune.recovery import RECOVERIES
from ovsprune.slim.pooling import pool_each_position
from tests.contracts.conftest import Case, prepared
from tests.contracts.test_recoveries import recover

FAMILY = FAMILIES.get("open_clip-vit")
VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
POOLED = {"attentional_pool": True, "attn_pooler_heads": 4, "attn_pooler_queries": 6}
COCA = {
    "custom_text": True,
    "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "coca": ({**POOLED, "output_tokens": True}, COCA),
    "coca of one width": (POOLED, {**COCA, "embed_dim": 32}),
    "coca by the mean": ({**POOLED, "pool_type": "avg", "final_ln_after_pool": True}, COCA),
    "coca_base": ({"output_tokens": True}, COCA),
    "coca_roberta": ({"output_tokens": True}, {**COCA, "text_cfg": {"hf_model_name": "x/roberta"}}),
    "xlm-roberta": ({}, {"text_cfg": {"hf_model_name": "x/xlm"}, "quick_gelu": True}),
    "clipa": ({"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}, {}),
    "layer scale": ({"ls_init_value": 1e-4}, {"custom_text": True}),
}


def config_of(name: str) -> dict[str, Any]:
    vision, model = VARIANTS[name]
    return {"embed_dim": 24, "text_cfg": TEXT, **model, "vision_cfg": {**VISION, **vision}}


@torch.no_grad()
def filled(module: nn.Module, seed: int = 0) -> None:
    """Fill all parameters with random values: no zeros, no layer scales of 1e-4."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = name.rpartition(".")[2] == "gamma" or (parameter.ndim == 1 and "weight" in name)
        parameter.copy_(1 + 0.2 * noise if scale else 0.2 * noise)


def variant(name: str) -> Backbone:
    config = config_of(name)
    model = build_clip(config)
    filled(model)
    text = other_tensors(model)
    dense = DenseModel(name, config, Preprocess((32, 32)), trained=True, text=text)
    return assemble("open_clip-vit", dense, model)


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest) -> Case:
    return prepared(variant(request.param), pictures=6)


@torch.no_grad()
def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.std())


def test_stages_compute_the_outputs_of_the_tower(case: Case) -> None:
    import open_clip

    config = deepcopy(case.backbone.architecture)
    reference = open_clip.model._build_vision_tower(
        config["embed_dim"], config["vision_cfg"], config.get("quick_gelu", False)
    ).eval()
    reference.load_state_dict(case.backbone.tower.state_dict())
    images = case.images()
    with torch.no_grad():
        expected = reference(images)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert error(case.backbone.pooled(images), expected) < 1e-5
    assert error(case.outputs(case.dense, images), case.outputs(case.backbone.tower, images)) < 1e-5
    assert torch.equal(case.backbone.tower(images), expected)  # of CoCa's, too, without its tokens


def test_dense_output_pools_each_patch_alone(case: Case) -> None:
    tower: Any = case.backbone.tower
    stages = case.backbone.stages(tower)
    images = case.images(2)
    with torch.no_grad():
        stream = stages.stem(images)
        for block in stages.blocks.values():
            stream = block(stream)
        for patch in (0, 7, 15):
            # twice, since the first of the tokens counts as the class token, which avg leaves out
            alone = stream[:, [1 + patch, 1 + patch]]
            expected = tower._pool(alone)[0] @ tower.proj
            found = stages.head(stream)[1].flatten(2)[:, :, patch]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_cut_equals_masked(case: Case, share: float) -> None:
    plan = case.random_plan(1, share)
    slim, masked = deepcopy(case.dense), deepcopy(case.dense)
    cut(slim, case.groups, plan)
    mask(masked, case.groups, plan)
    FAMILY.finish(slim, case.groups, plan)
    images = case.images()
    expected, found = case.backbone.stages(masked), case.backbone.stages(slim)
    for one, two in zip(expected.outputs(images), found.outputs(images), strict=True):
        assert error(two, one) < 1e-4
    # and it can fail: another unit of the first block's MLP
    group = case.groups[1]
    plan.kept[group.name][0] = removed_units(group, plan)[0]  # type: ignore[index]
    other = deepcopy(case.dense)
    mask(other, case.groups, plan)
    for one, two in zip(
        case.backbone.stages(other).outputs(images), found.outputs(images), strict=True
    ):
        assert error(two, one) > 1e-3


@pytest.mark.parametrize("recovery", RECOVERIES.names())
@pytest.mark.parametrize("case", ["coca", "clipa", "layer scale"], indirect=True)
def test_keeping_all_units_gives_the_original(case: Case, recovery: str) -> None:
    plan = case.full_plan()
    slim = deepcopy(case.dense)
    cut(slim, case.groups, plan)
    recover(case, slim, plan, recovery)
    FAMILY.finish(slim, case.groups, plan)
    before, after = case.backbone.tower.state_dict(), slim.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


QUICK: dict[str, Any] = {"samples": 4, "probe": 2, "criterion": "magnitude"}
FRESH = """
import hashlib, sys, torch
torch.set_num_threads(int(sys.argv[2]))
import ovsprune
tower = ovsprune.load(sys.argv[1])
images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    outputs = torch.cat([tower(images).flatten(), tower.dense(images).flatten()])
assert not {"open_clip", "timm"} & set(sys.modules)
print(hashlib.sha256(bytes(outputs.untyped_storage())).hexdigest())
"""


def test_checkpoint_loads_and_attaches_to_a_tower(case: Case, tmp_path: Path) -> None:
    backbone = case.backbone
    done = prune(backbone, 0.4, output=tmp_path / "slim", allocation="uniform", **QUICK)
    assert abs(done.achieved - 0.4) <= 0.01
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = [x.detach() for x in backbone.stages(done.tower).outputs(images)]
    own = ovsprune.load(tmp_path / "slim")
    with torch.no_grad():
        found = [own(images), own.dense(images)]
    for one, two in zip(expected, found, strict=True):
        assert error(two, one) < 1e-5
    state = done.tower.state_dict()
    assert own.tower.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in own.tower.state_dict().items())

    tower = build_clip(backbone.architecture).get_submodule("visual")
    tower.output_tokens = False
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    applied = ovsprune.apply(tower, ovsprune.read(tmp_path / "slim"))
    with torch.no_grad():
        assert error(tower(images), expected[0]) < 1e-5
    applied.detach()
    after = tower.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[k], v) for k, v in before.items())

    again = backbones.load_backbone(str(tmp_path / "slim"))
    for one, two in zip(expected, again.outputs(images), strict=True):
        assert error(two, one) < 1e-5
    assert again.text.keys() == backbone.text.keys()
    assert again.has_text == backbone.has_text


def test_fresh_process_loads_identical_outputs(tmp_path: Path) -> None:
    prune(variant("coca"), 0.4, output=tmp_path / "slim", allocation="uniform", **QUICK)
    own = ovsprune.load(tmp_path / "slim")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = torch.cat([own(images).flatten(), own.dense(images).flatten()])
    expected = hashlib.sha256(bytes(outputs.untyped_storage())).hexdigest()
    arguments = [str(tmp_path / "slim"), str(torch.get_num_threads())]
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected


def test_base_hashes_cover_a_pooler_of_two_widths(tmp_path: Path) -> None:
    from ovsprune.slim.hashing import match

    backbone = variant("coca")
    prune(backbone, 0.4, output=tmp_path / "slim", allocation="uniform", **QUICK)
    base = ovsprune.read(tmp_path / "slim").spec.base
    state = {k: v.half() for k, v in backbone.tower.state_dict().items()}
    assert set(match(backbone.tower.state_dict(), base).values()) == {"equal"}
    assert set(match(state, base).values()) == {"equal-after-half"}


def test_coca_loads_in_the_classes_of_open_clip(tmp_path: Path) -> None:
    import open_clip

    backbone = variant("coca")
    assert backbone.encode_text(["a cat", "a dog"]).shape == (2, 24)
    done = prune(backbone, 0.4, output=tmp_path / "slim", allocation="uniform", **QUICK)
    model, _, _ = ovsprune.load_open_clip(tmp_path / "slim")
    assert isinstance(model, open_clip.CoCa)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = model.encode_image(images, normalize=False)
        expected = backbone.stages(done.tower).outputs(images)[0]
    assert error(found, expected) < 1e-5
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in backbone.text.items())


def test_pool_each_position_equals_the_pooler_on_one_token() -> None:
    for name in ("coca", "coca of one width"):
        pooler = variant(name).tower.get_submodule("attn_pool")
        tokens = torch.randn(2, 5, 32)
        with torch.no_grad():
            found = pool_each_position(pooler, tokens)
            for i in range(5):
                expected = pooler(tokens[:, i : i + 1])
                torch.testing.assert_close(found[:, i], expected[:, 0], atol=1e-6, rtol=1e-5)
                torch.testing.assert_close(found[:, i], expected[:, 5], atol=1e-6, rtol=1e-5)


def test_all_vision_transformers_of_open_clip_are_listed() -> None:
    import open_clip

    expected = {"tiny"}
    for name in open_clip.list_models():
        vision = open_clip.get_model_config(name)["vision_cfg"]  # type: ignore[index]
        if "timm_model_name" not in vision and not isinstance(vision["layers"], list):
            expected.add(name)
    assert set(FAMILY.names()) == expected
    assert {"coca_base", "coca_roberta-ViT-B-32", "coca_ViT-L-14", "mt5-xl-ViT-H-14",
            "nllb-clip-base", "ViT-M-16-alt", "ViT-H-14-CLIPA-336"} < expected  # fmt: skip


def test_two_poolers_are_not_taken(tmp_path: Path) -> None:
    config = config_of("coca")
    assert FAMILY.takes(config)
    config["vision_cfg"]["attentional_pool"] = "cascade"
    assert not FAMILY.takes(config)


def saved(backbone: Backbone, text: dict[str, Tensor], path: Path) -> Path:
    tower = {f"visual.{k}": v for k, v in backbone.tower.state_dict().items()}
    torch.save({**tower, **text}, path)
    return path


@pytest.fixture
def hub_text(monkeypatch: pytest.MonkeyPatch) -> str:
    """Replace ``roberta-ViT-B-32`` by a small model; its text tower is of another library."""
    import open_clip

    from ovsprune.backbones import open_clip_build

    real, small = open_clip.get_model_config, config_of("xlm-roberta")
    name = "roberta-ViT-B-32"
    monkeypatch.setattr(
        open_clip,
        "get_model_config",
        lambda asked: deepcopy(small if asked == name else real(asked)),
    )
    open_clip_build.names_of.cache_clear()
    return name


def test_text_tower_of_a_hub_is_passed_through(hub_text: str, tmp_path: Path) -> None:
    text = {"text.transformer.pooler.weight": torch.randn(3, 3), "logit_scale": torch.tensor(2.0)}
    file = saved(variant("xlm-roberta"), text, tmp_path / "w.pt")
    backbone = backbones.load_backbone(hub_text, pretrained=str(file))
    assert backbone.text.keys() == text.keys()
    assert backbone.activation == "quick_gelu"
    assert not backbone.has_text
    (note,) = backbone.notes
    assert "text tower of roberta-ViT-B-32 (x/xlm) lives on a hub" in note
    with pytest.raises(WeightsError, match="loaded without a text tower"):
        backbone.encode_text(["a cat"])
    prune(backbone, 0.4, output=tmp_path / "slim", allocation="uniform", **QUICK)
    again = backbones.load_backbone(str(tmp_path / "slim"))
    assert all(torch.equal(again.text[k], v) for k, v in text.items())
    assert not again.has_text
    with pytest.raises(CheckpointError, match="the text tower is the Hugging Face model x/xlm"):
        ovsprune.load_open_clip(tmp_path / "slim")


def test_text_tower_of_a_hub_may_be_missing(hub_text: str, tmp_path: Path) -> None:
    file = saved(variant("xlm-roberta"), {}, tmp_path / "w.pt")
    backbone = backbones.load_backbone(hub_text, pretrained=str(file))
    assert backbone.trained and not backbone.text
    random = backbones.load_backbone(hub_text, pretrained="none")
    assert not random.trained and not random.text and not random.has_text


def test_missing_tokenizer_of_a_hub_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = config_of("clipa")
    config["text_cfg"] = {**TEXT, "hf_tokenizer_name": "nobody/no-such-tokenizer"}
    model = build_clip(config)
    dense = DenseModel("x", config, Preprocess((32, 32)), text=other_tensors(model))
    backbone = assemble("open_clip-vit", dense, model)
    with pytest.raises(WeightsError, match=r"tokenizer 'nobody/no-such.* --text-embeddings FILE"):
        backbone.encode_text(["a cat"])
