"""Vision towers of transformers: stages, cutting, checkpoints, attaching."""

from __future__ import annotations

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
from ovsprune.core.errors import CheckpointError, MissingLibraryError, TargetError
from ovsprune.core.records import Group, Plan
from ovsprune.graph.cut import cut, mask
from ovsprune.graph.groups import find_groups
from ovsprune.pruning.search_space import split_protected
from ovsprune.slim.config import dump
from ovsprune.slim.transformers_tower import TransformersTower
from tests.backbones.hf_models import CONFIGS, SIZE, folder_of, make

FAMILY = FAMILIES.get("transformers-vit")
CHEAP = {"samples": 4, "criterion": "magnitude", "allocation": "uniform", "recovery": "none"}
SWIGLU = {"use_swiglu_ffn": True, "hidden_act": "gelu"}


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def all_groups(tower: nn.Module) -> list[Group]:
    """Return all groups, with the protected heads of the last block."""
    return find_groups(tower, FAMILY.prunable_layers(tower), (SIZE, SIZE))


def random_plan(groups: list[Group], seed: int = 0) -> Plan:
    generator = torch.Generator().manual_seed(seed)
    return Plan(
        {
            g.name: torch.randperm(g.units, generator=generator)[: g.units // 2].sort().values
            for g in groups
        }
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest error, in standard deviations of the expected values."""
    return float((found - expected).abs().max() / expected.std())


def library_outputs(model: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return pooled embedding and patch tokens that transformers computes for images."""
    if type(model).__name__ == "Siglip2VisionModel":
        from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

        rows = torch.stack([convert_image_to_patches(image, 8) for image in images])
        shape = torch.tensor([[images.shape[2] // 8, images.shape[3] // 8]] * len(images))
        ones = torch.ones(rows.shape[:2], dtype=torch.int32)
        out = model(pixel_values=rows, pixel_attention_mask=ones, spatial_shapes=shape)
    else:
        out = model(pixel_values=images)
    pooled = out.image_embeds if hasattr(out, "image_embeds") else out.pooler_output
    return pooled, out.last_hidden_state


@pytest.mark.parametrize("name", CONFIGS)
def test_tower_outputs_equal_those_of_transformers(name: str, images: Tensor) -> None:
    model = make(name)
    tower = TransformersTower(model)
    pooled, dense = FAMILY.stages(tower).outputs(images)
    expected, _ = library_outputs(model, images)
    assert relative_error(tower(images), expected) < 1e-5
    assert relative_error(pooled, expected) < 1e-5
    assert dense.shape == (3, pooled.shape[1], SIZE // 8, SIZE // 8)
    assert list(tower.state_dict()) == list(model.state_dict())


def test_dense_output_with_a_class_token() -> None:
    """Compare with norm (and projection) of the class token, applied to the patch tokens."""
    images = torch.randn(2, 3, SIZE, SIZE)
    clip, projecting = make("CLIPVisionModel"), make("CLIPVisionModelWithProjection")
    for model, trunk, last in (
        (clip, clip, lambda x: x),
        (projecting, projecting.vision_model, projecting.visual_projection),
    ):
        tokens = trunk.post_layernorm(library_outputs(model, images)[1])
        expected = last(tokens)[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
        assert relative_error(TransformersTower(model).outputs(images)[1], expected) < 1e-5
    dino = make("Dinov2Model")
    expected = library_outputs(dino, images)[1][:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    assert relative_error(TransformersTower(dino).outputs(images)[1], expected) < 1e-5


@pytest.mark.parametrize("name", ["SiglipVisionModel", "Siglip2VisionModel"])
def test_dense_output_with_an_attention_pool(name: str, images: Tensor) -> None:
    """Compare with the output of the pool for each position alone."""
    model = make(name)
    dense = TransformersTower(model).outputs(images)[1]
    tokens = library_outputs(model, images)[1]
    for position in (0, 5, 15):
        alone = model.head(tokens[:, position : position + 1])
        assert relative_error(dense.flatten(2)[:, :, position], alone) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_other_input_sizes(name: str) -> None:
    tower = TransformersTower(make(name))
    pooled, dense = tower.outputs(torch.randn(2, 3, 48, 40))
    assert dense.shape[2:] == (6, 5)
    assert pooled.shape == (2, dense.shape[1])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*CONFIGS, "swiglu"])
def test_cut_equals_masked(name: str, attention: str, images: Tensor) -> None:
    made = make("Dinov2Model", attention=attention, **SWIGLU) if name == "swiglu" else None
    tower = TransformersTower(made or make(name, attention=attention))
    assert tower.model.config._attn_implementation == attention
    groups = all_groups(tower)
    plan, other = random_plan(groups), random_plan(groups, 1)
    slim, masked, wrong = deepcopy(tower), deepcopy(tower), deepcopy(tower)
    cut(slim, groups, plan)
    mask(masked, groups, plan)
    mask(wrong, groups, other)
    FAMILY.finish(slim, groups, plan)
    for found, expected, control in zip(
        slim.outputs(images), masked.outputs(images), wrong.outputs(images), strict=True
    ):
        assert relative_error(found, expected) < 1e-4
        assert relative_error(found, control) > 1e-1
    assert relative_error(slim(images), masked(images)) < 1e-4
    fewer = sum(p.numel() for p in slim.parameters()) / sum(p.numel() for p in tower.parameters())
    assert fewer < 0.75


def test_groups_of_a_siglip_tower() -> None:
    tower = TransformersTower(make("SiglipVisionModel"))
    groups = {g.name: g for g in all_groups(tower)}
    assert set(groups) == {
        "encoder.layers.0.self_attn", "encoder.layers.0.mlp", "encoder.layers.1.self_attn",
        "encoder.layers.1.mlp", "head.mlp",
    }  # fmt: skip
    heads = groups["encoder.layers.0.self_attn"]
    assert (heads.units, heads.columns.shape[1], heads.consumer) == (
        4, 8, "encoder.layers.0.self_attn.out_proj",
    )  # fmt: skip
    assert {(s.module.rpartition(".")[2], s.axis) for s in heads.slices} == {
        ("q_proj", "out"), ("k_proj", "out"), ("v_proj", "out"), ("out_proj", "in"),
    }  # fmt: skip
    _, protected = split_protected(FAMILY.prunable_layers(tower), ())
    assert list(protected) == ["encoder.layers.1.self_attn"]


@pytest.mark.parametrize("name", CONFIGS)
def test_plan_that_keeps_all_units(name: str, images: Tensor) -> None:
    tower = TransformersTower(make(name))
    same, groups = deepcopy(tower), all_groups(tower)
    plan = Plan({g.name: torch.arange(g.units) for g in groups})
    FAMILY.rewrite(same)
    cut(same, groups, plan)
    FAMILY.finish(same, groups, plan)
    assert torch.equal(same(images), tower(images))
    assert all(torch.equal(v, same.state_dict()[k]) for k, v in tower.state_dict().items())


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpoint_loads_and_attaches_to_a_tower(
    name: str, tmp_path: Path, images: Tensor
) -> None:
    """Prune from a folder, load again, and apply to a model built by transformers."""
    folder = folder_of(make(name), tmp_path / "mine")
    # transformers 5.24 resamples the positions of SigLIP 2 by a product, which stays
    done = ovsprune.prune(f"hf:{folder}", 0.35, output=tmp_path / "slim", **CHEAP)
    assert (done.spec.base.model, done.spec.base.pretrained) == ("mine", "local")
    assert done.spec.base.trained
    assert str(tmp_path) not in dump(done.spec)
    expected = done.tower.outputs(images)

    loaded = ovsprune.load(tmp_path / "slim")
    assert torch.equal(loaded(images), done.tower(images))
    assert torch.equal(loaded.dense(images), expected[1])
    again = backbones.load_backbone(str(tmp_path / "slim"))
    assert torch.equal(again.dense(images), expected[1])

    model = make(name)
    before, state = library_outputs(model, images)[0], deepcopy(model.state_dict())
    applied = ovsprune.apply(model, ovsprune.read(tmp_path / "slim"))
    assert torch.equal(
        library_outputs(model, images)[0], library_outputs(loaded.tower.model, images)[0]
    )
    assert relative_error(library_outputs(model, images)[0], expected[0]) < 1e-5
    assert relative_error(library_outputs(model, images)[0], before) > 1e-2
    applied.detach()
    assert torch.equal(library_outputs(model, images)[0], before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_heads_are_stored_as_slices(tmp_path: Path) -> None:
    folder = folder_of(make("Dinov2Model"), tmp_path / "mine")
    done = ovsprune.prune(str(folder), 0.4, output=tmp_path / "slim", **CHEAP)
    layer = done.spec.layer("encoder.layer.0.attention")
    assert not layer.is_whole_attention
    assert [s.module.rpartition(".")[2] for s in layer.slices if s.axis == "in"] == ["o_proj"]
    tensors = ovsprune.read(tmp_path / "slim").tower()
    assert tensors["encoder.layer.0.attention.q_proj.weight"].shape == (8 * layer.kept, 32)
    assert tensors["encoder.layer.0.attention.q_proj.bias"].shape == (8 * layer.kept,)


def test_mask_applies_to_finetuned_weights(tmp_path: Path, images: Tensor) -> None:
    folder = folder_of(make("SiglipVisionModel"), tmp_path / "mine")
    ovsprune.prune(str(folder), 0.4, output=tmp_path / "slim", **CHEAP)
    checkpoint, other = ovsprune.read(tmp_path / "slim"), make("SiglipVisionModel", seed=1)
    masked = TransformersTower(deepcopy(other))
    groups = [g for g in all_groups(masked) if g.name in checkpoint.mask]
    mask(masked, groups, Plan(checkpoint.mask))
    ovsprune.apply(other, checkpoint, weights="target")
    assert relative_error(library_outputs(other, images)[0], masked(images)) < 1e-4


def test_a_slim_tower_is_pruned_again(tmp_path: Path, images: Tensor) -> None:
    folder = folder_of(make("SiglipVisionModel"), tmp_path / "mine")
    one = ovsprune.prune(str(folder), 0.2, output=tmp_path / "one", **CHEAP)
    two = ovsprune.prune(str(tmp_path / "one"), 0.15, output=tmp_path / "two", **CHEAP)
    checkpoint = ovsprune.read(tmp_path / "two")
    for name, kept in ovsprune.read(tmp_path / "one").mask.items():
        assert set(checkpoint.mask[name].tolist()) <= set(kept.tolist())
    assert two.spec.slim.macs < one.spec.slim.macs
    model = make("SiglipVisionModel")  # nothing was refitted: the mask says it all
    ovsprune.apply(model, checkpoint, weights="target")
    loaded = ovsprune.load(tmp_path / "two")
    assert relative_error(library_outputs(model, images)[0], loaded(images)) < 1e-5


def test_base_weights_are_recognised(tmp_path: Path) -> None:
    from ovsprune.slim.hashing import match

    folder = folder_of(make("CLIPVisionModel"), tmp_path / "mine")
    done = ovsprune.prune(str(folder), 0.4, output=tmp_path / "slim", **CHEAP)
    found = match(make("CLIPVisionModel").state_dict(), done.spec.base)
    assert set(found.values()) == {"equal"}
    assert len(found) == len(done.spec.base.tensors)


def test_a_slim_tower_on_another_model_is_refused(tmp_path: Path) -> None:
    folder = folder_of(make("CLIPVisionModel"), tmp_path / "mine")
    ovsprune.prune(str(folder), 0.4, output=tmp_path / "slim", **CHEAP)
    checkpoint = ovsprune.read(tmp_path / "slim")
    with pytest.raises(TargetError, match=r"has no tensor embeddings\.class_embedding, pre_"):
        ovsprune.apply(make("SiglipVisionModel"), checkpoint)
    with pytest.raises(TargetError, match=r"looks like a whole CLIP: pass its \.vision_model"):
        ovsprune.apply(make("CLIPModel"), checkpoint)
    with pytest.raises(TargetError, match=r"shape \(16, 16\), expected 32 on axis 0"):
        small = make("CLIPVisionModel", hidden_size=16, num_attention_heads=2)
        ovsprune.apply(small, checkpoint)
    with pytest.raises(TargetError, match="uses gelu, the checkpoint was pruned with quick_gelu"):
        ovsprune.apply(make("CLIPVisionModel", hidden_act="gelu"), checkpoint)


@pytest.mark.parametrize(
    ("architecture", "match"),
    [
        ({"class": "BertModel", "config": {}}, "cannot build the transformers class 'BertModel'"),
        ({"class": "os.system", "config": {}}, "cannot build the transformers class 'os.system'"),
        ({"class": "CLIPVisionModel"}, "needs the entries class and config"),
        ({"class": "CLIPModel", "config": {}}, "CLIPModel has no vision_config"),
        ({"class": "CLIPVisionModel", "config": {"hidden_size": "x"}}, "cannot build this CLIPV"),
        ({"class": "CLIPVisionModel", "config": {"hidden_act": "x"}}, "cannot build this CLIPV"),
    ],
)
def test_unknown_architectures_are_refused(architecture: dict[str, Any], match: str) -> None:
    from ovsprune.slim.transformers_build import build_tower

    with pytest.raises(CheckpointError, match=match):
        build_tower(architecture)


def test_configuration_cannot_select_code() -> None:
    """Check that entries about computation or code to load are ignored."""
    from ovsprune.slim.transformers_build import build_tower, describe_architecture

    config = {
        **CONFIGS["CLIPVisionModel"],
        "attn_implementation": "somebody/kernels",
        "_attn_implementation": "somebody/kernels",
        "auto_map": {"AutoModel": "modeling.Mine"},
        "quantization_config": {"quant_method": "mine"},
        "_name_or_path": "/home/somebody",
    }
    architecture = describe_architecture("CLIPVisionModel", config)
    assert set(architecture["config"]) - set(config) <= {
        "projection_dim", "num_channels", "hidden_act", "layer_norm_eps", "attention_dropout",
        "initializer_range", "initializer_factor",
    }  # fmt: skip
    assert not any(key in str(architecture) for key in ("somebody", "Mine", "quant"))
    built = build_tower({"class": "CLIPVisionModel", "config": config})
    assert built.model.config._attn_implementation == "sdpa"


def test_missing_or_old_library_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    folder = folder_of(make("Dinov2Model"), tmp_path / "mine")
    ovsprune.prune(str(folder), 0.4, output=tmp_path / "slim", **CHEAP)
    monkeypatch.setattr(transformers, "__version__", "5.9.1")
    with pytest.raises(
        MissingLibraryError,
        match=r"Dinov2Model of transformers 5\.9\.1 does not support .*>=5\.18'",
    ):
        ovsprune.load(tmp_path / "slim")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        MissingLibraryError, match=r"building this tower needs transformers \(.*pip install trans"
    ):
        ovsprune.load(tmp_path / "slim")
    assert ovsprune.read(tmp_path / "slim").spec.library == "transformers"  # needs none
