from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ovsprune.core.errors import CheckpointError, MissingLibraryError, OptionError
from ovsprune.core.records import Preprocess
from ovsprune.slim.apply import apply
from ovsprune.slim.load import SlimTower, load
from ovsprune.slim.read import SlimCheckpoint, read
from ovsprune.slim.vit import resize_positions
from ovsprune.slim.write import write

Make = Callable[..., nn.Module]


@pytest.fixture
def load_dense(slim_spec: Any, tmp_path: Path) -> Callable[..., SlimTower]:
    """Return a function that loads a tower with all weights of a dense one."""

    def make(tower: nn.Module, **changes: Any) -> SlimTower:
        state = tower.state_dict()
        spec, _ = slim_spec(state, **changes)
        spec = replace(spec, layers=tuple(replace(x, kept=x.units) for x in spec.layers))
        mask = {layer.name: torch.arange(layer.units) for layer in spec.layers}
        tensors = {f"visual.{k}": v for k, v in state.items()}
        return load(write(tmp_path / "dense", spec, tensors, mask, card=""))

    return make


def dense_features(tower: Any, images: Tensor) -> Tensor:
    """Compute the dense features of open_clip's tower, independently of the package."""
    stream = tower.transformer(tower._embeds(images))
    tokens = tower.ln_post(stream[:, 1:]) @ tower.proj
    return tokens.transpose(1, 2).unflatten(2, tower.grid_size)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@torch.no_grad()
def test_loaded_tower_equals_open_clip(
    make_tower: Make, load_dense: Any, images: Tensor, activation: str
) -> None:
    tower = make_tower(activation)
    own = load_dense(tower, activation=activation)
    torch.testing.assert_close(own(images), tower(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(own.dense(images), dense_features(tower, images), atol=1e-5, rtol=0)
    assert own.tower.state_dict().keys() == tower.state_dict().keys()


@pytest.mark.parametrize(
    ("options", "config"),
    [
        ({"no_ln_pre": True}, {}),
        ({"ls_init_value": 0.1}, {}),
        ({"pool_type": "avg"}, {"pool_type": "avg"}),
        (
            {"pool_type": "avg", "final_ln_after_pool": True},
            {"pool_type": "avg", "final_ln_after_pool": True},
        ),
        (
            {"norm_layer": lambda width: nn.LayerNorm(width, eps=0.1)},
            {"norm_kwargs": {"eps": 0.1}},
        ),
    ],
)
@torch.no_grad()
def test_loaded_variants_equal_open_clip(
    make_tower: Make, load_dense: Any, images: Tensor, options: Any, config: Any
) -> None:
    tower = make_tower(**options)
    own = load_dense(tower, architecture={"vision_cfg": {"head_width": 12, **config}})
    torch.testing.assert_close(own(images), tower(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(own.dense(images), dense_features(tower, images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(32, 32), (96, 96), (80, 48)])
@torch.no_grad()
def test_other_input_sizes_equal_open_clip(
    make_tower: Make, load_dense: Any, size: tuple[int, int]
) -> None:
    from open_clip.model import resize_pos_embed

    tower = make_tower()
    own = load_dense(tower)
    resized = make_tower(size=size)
    state = {f"visual.{k}": v for k, v in tower.state_dict().items()}
    holder = nn.Module()
    holder.visual = resized
    resize_pos_embed(state, holder)
    holder.load_state_dict(state)
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(own(images), resized(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        own.dense(images), dense_features(resized, images), atol=1e-5, rtol=0
    )


@torch.no_grad()
def test_slim_tower_equals_the_masked_dense_tower(
    make_tower: Make, write_slim: Any, masked: Any, images: Tensor
) -> None:
    path = write_slim(make_tower())
    slim, checkpoint = load(path), read(path)
    expected = masked(make_tower(), checkpoint)
    torch.testing.assert_close(slim(images), expected(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        slim.dense(images), dense_features(expected, images), atol=1e-5, rtol=0
    )
    applied = make_tower()
    apply(applied, checkpoint)
    torch.testing.assert_close(slim(images), applied(images), atol=1e-5, rtol=0)
    sizes = {name: p.shape for name, p in slim.tower.named_parameters()}
    assert sizes["transformer.resblocks.0.attn.out_proj.weight"] == (48, 24)
    assert sizes["transformer.resblocks.0.mlp.c_fc.weight"] == (48, 48)


def test_loaded_tensors_equal_the_saved_ones_bit_for_bit(checkpoint: SlimCheckpoint) -> None:
    slim = load(checkpoint.path)
    state = slim.tower.state_dict()
    assert state.keys() == checkpoint.tower().keys()
    assert all(torch.equal(state[name], value) for name, value in checkpoint.tower().items())
    assert slim.spec == checkpoint.spec
    assert slim.mask.keys() == checkpoint.mask.keys()
    assert not slim.training
    with torch.no_grad():
        slim.tower.proj.zero_()  # its own memory, not the file's
    assert not torch.equal(load(checkpoint.path).tower.proj, slim.tower.proj)


def test_dtype_option_and_second_save(
    checkpoint: SlimCheckpoint, tmp_path: Path, images: Tensor
) -> None:
    half = load(checkpoint.path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        full = load(checkpoint.path)(images)
        torch.testing.assert_close(half(images.bfloat16()).float(), full, atol=0.3, rtol=0.1)
        assert half.dense(torch.randn(1, 3, 96, 80).bfloat16()).shape == (1, 24, 6, 5)
    tensors = {f"visual.{k}": v for k, v in half.tower.state_dict().items()}
    again = write(tmp_path / "again", half.spec, tensors, half.mask, card="")
    assert load(again).tower.proj.dtype == torch.bfloat16
    assert copy.deepcopy(half).tower.proj.dtype == torch.bfloat16


def test_unlisted_attentions_keep_all_heads(
    make_tower: Make, slim_spec: Any, tmp_path: Path, images: Tensor
) -> None:
    tower = make_tower()
    spec, _ = slim_spec(tower.state_dict())
    bare = replace(spec, layers=())
    tensors = {f"visual.{k}": v for k, v in tower.state_dict().items()}
    own = load(write(tmp_path / "bare", bare, tensors, {}, card=""))
    with torch.no_grad():
        torch.testing.assert_close(own(images), tower(images), atol=1e-5, rtol=0)
    assert own.tower.transformer.resblocks[0].attn.kept_heads == (0, 1, 2, 3)


def test_grid_that_is_not_square(
    make_tower: Make, slim_spec: Any, load_dense: Any, images: Tensor
) -> None:
    tower = make_tower(size=(64, 32))
    own = load_dense(
        tower,
        architecture={"vision_cfg": {"image_size": [64, 32]}},
        preprocess=Preprocess((64, 32)),
    )
    picture = images[..., :32]
    with torch.no_grad():
        torch.testing.assert_close(own(picture), tower(picture), atol=1e-5, rtol=0)
        assert own.dense(images).shape == (2, 24, 4, 4)


def test_resizing_positions_back_and_forth_keeps_the_class_token() -> None:
    positions = torch.randn(17, 8)
    assert resize_positions(positions, (4, 4), (4, 4)) is positions
    there = resize_positions(positions, (4, 4), (8, 6))
    assert there.shape == (49, 8)
    assert torch.equal(there[0], positions[0])
    constant = torch.ones(17, 8)
    torch.testing.assert_close(resize_positions(constant, (4, 4), (3, 7)), torch.ones(22, 8))


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 3, 15, 64), (1, 1, 64, 64)])
def test_images_of_another_shape_are_refused(
    checkpoint: SlimCheckpoint, shape: tuple[int, ...]
) -> None:
    slim = load(checkpoint.path)
    with pytest.raises(OptionError, match=r"images have shape .*, expected \[B, 3, H, W\] with H"):
        slim(torch.zeros(shape))
    with pytest.raises(OptionError, match="images have shape"):
        slim.dense(torch.zeros(shape))


def test_unknown_family_is_refused(make_tower: Make, write_slim: Any) -> None:
    path = write_slim(make_tower(), family="timm-convnext", library="timm", library_version="1.0")
    with pytest.raises(
        MissingLibraryError, match=r"family 'timm-convnext'.* build the tower with timm 1"
    ):
        load(path)


def test_two_attention_pools_are_refused(make_tower: Make, write_slim: Any) -> None:
    path = write_slim(make_tower(attentional_pool="cascade", attn_pooler_heads=4))
    with pytest.raises(MissingLibraryError, match="has two attention pools"):
        load(path)


def test_invalid_pooler_heads_are_refused(make_tower: Make, write_slim: Any) -> None:
    tower = make_tower(attentional_pool=True, attn_pooler_heads=4)
    path = write_slim(tower, architecture={"vision_cfg": {"attn_pooler_heads": 5}})
    with pytest.raises(CheckpointError, match="attn_pooler_heads is 5 for a width of 24"):
        load(path)


def drop(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


def put(name: str, *shape: int) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("visual.conv1.weight"), r"do not form a CLIP vision transformer \('conv1.weight'\)"),
        (drop("visual.ln_post.weight"), r"ln_post\.weight None instead of \(48,\)"),
        (put("visual.extra", 3), r"extra \(3,\) instead of None"),
        (put("visual.ln_pre.bias", 40), r"ln_pre\.bias \(40,\) instead of \(48,\)"),
        (
            put("visual.positional_embedding", 15, 48),
            "has 14 patch positions, which fits neither the native",
        ),
        (put("visual.transformer.resblocks.9.ln_1.bias", 48), r"blocks \[0, 1, 2, 9\]"),
        (put("visual.transformer.resblocks.x.ln_1.bias", 48), "do not form a CLIP vision"),
    ],
)
def test_inconsistent_tensors_are_refused(
    checkpoint: SlimCheckpoint, tmp_path: Path, change: Any, message: str
) -> None:
    tensors = dict(checkpoint.tensors)
    change(tensors)
    path = write(tmp_path / "odd", checkpoint.spec, tensors, checkpoint.mask, card="")
    with pytest.raises(CheckpointError, match=message):
        load(path)
