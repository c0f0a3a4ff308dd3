"""Input sizes other than the native one: SAN's 320, CAT-Seg's 384, and grids that are not square.

The expected output is that of open_clip's tower of that size, with positions interpolated by
open_clip and removed units masked to zero.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsprune.core.errors import OptionError, TargetError
from ovsprune.slim.apply import apply
from ovsprune.slim.load import load
from ovsprune.slim.read import SlimCheckpoint, read
from ovsprune.slim.vit import bicubic_matrix, resize_positions

Make = Callable[..., nn.Module]

SIZES = [(320, 320), (384, 384), (320, 384), (48, 96)]
POOLS: dict[str, dict[str, Any]] = {
    "class token": {},
    "average": {"pool_type": "avg"},
    "average, then the norm": {"pool_type": "avg", "final_ln_after_pool": True},
}


@pytest.fixture(params=POOLS)
def pool(request: pytest.FixtureRequest) -> dict[str, Any]:
    return POOLS[request.param]


@pytest.fixture
def written(make_tower: Make, write_slim: Any, pool: dict[str, Any]) -> Path:
    """Return a slim checkpoint of the native size 64 x 64."""
    config = {"image_size": 64, "head_width": 12, **pool}
    found = write_slim(make_tower(**pool), architecture={"vision_cfg": config})
    assert isinstance(found, Path)
    return found


def resized(make_tower: Make, pool: dict[str, Any], size: tuple[int, int]) -> nn.Module:
    """Build open_clip's tower of ``size``, with weights and positions that open_clip resizes."""
    from open_clip.model import resize_pos_embed

    holder = nn.Module()
    holder.visual = make_tower(size=size, **pool)
    state = {f"visual.{k}": v for k, v in make_tower(**pool).state_dict().items()}
    resize_pos_embed(state, holder)
    holder.load_state_dict(state)
    return holder.visual


def outputs(tower: Any, images: Tensor) -> Tensor:
    """Compute pooled and dense output of open_clip's tower, flattened into one tensor."""
    tokens = tower.ln_post(tower.transformer(tower._embeds(images))[:, 1:]) @ tower.proj
    return torch.cat([tower(images).flatten(), tokens.transpose(1, 2).flatten()])


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.std())


def images_of(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_loaded_and_attached_at_another_size(
    make_tower: Make, written: Path, masked: Any, pool: dict[str, Any], size: tuple[int, int]
) -> None:
    checkpoint, images = read(written), images_of(size)
    dense = resized(make_tower, pool, size)
    whole = outputs(dense, images)
    expected = outputs(masked(dense, checkpoint), images)
    assert error(whole, expected) > 1e-2  # removing the units changes the output

    slim = load(written)
    both = slim.outputs(images)
    assert error(torch.cat([x.flatten() for x in both]), expected) < 1e-4
    assert torch.equal(both[0], slim(images)) and torch.equal(both[1], slim.dense(images))
    fixed = load(written, size=size)
    assert error(torch.cat([x.flatten() for x in fixed.outputs(images)]), expected) < 1e-4
    assert fixed.tower.positional_embedding.shape[0] == 1 + size[0] * size[1] // 256

    built = make_tower(size=size, seed=9, **pool)
    before = outputs(built, images)
    applied = apply(built, checkpoint)
    assert error(outputs(built, images), expected) < 1e-4
    applied.detach()
    assert torch.equal(outputs(built, images), before)


@torch.no_grad()
def test_another_grid_with_as_many_patches_is_interpolated(
    make_tower: Make, checkpoint: SlimCheckpoint
) -> None:
    """Both grids have 16 patches; open_clip's loader would not interpolate 4 x 4 to 2 x 8."""
    built = make_tower(size=(32, 128), seed=9)
    apply(built, checkpoint)
    native = checkpoint.tower()["positional_embedding"]
    torch.testing.assert_close(built.positional_embedding, resize_positions(native, (4, 4), (2, 8)))
    images = images_of((32, 128))
    slim = load(checkpoint.path)
    together = torch.cat([x.flatten() for x in slim.outputs(images)])
    assert error(outputs(built, images), together) < 1e-4


def test_tower_without_grid_attribute_must_be_square(
    make_tower: Make, checkpoint: SlimCheckpoint
) -> None:
    square, oblong = make_tower(size=96, seed=9), make_tower(size=(48, 96), seed=9)
    native = checkpoint.tower()["positional_embedding"]
    del square.grid_size, oblong.grid_size
    apply(square, checkpoint)
    torch.testing.assert_close(
        square.positional_embedding, resize_positions(native, (4, 4), (6, 6))
    )
    before = oblong.positional_embedding
    with pytest.raises(TargetError, match=r"positional_embedding \(19, 48\) instead of \(17, 48\)"):
        apply(oblong, checkpoint)
    assert oblong.positional_embedding is before


def test_set_size_interpolates_positions_once(checkpoint: SlimCheckpoint) -> None:
    slim = load(checkpoint.path, size=(64, 64))
    native = checkpoint.tower()["positional_embedding"]
    assert torch.equal(slim.tower.positional_embedding, native)
    slim.set_size((320, 384))
    assert slim.tower.grid_size == (20, 24)
    assert slim.tower.positional_embedding.requires_grad
    assert slim.spec == checkpoint.spec  # the spec keeps the size of the checkpoint
    with pytest.raises(OptionError, match="at least one patch"):
        load(checkpoint.path, size=(8, 64))


@pytest.mark.parametrize(
    ("old", "new"), [(4, 4), (4, 6), (14, 20), (14, 24), (14, 7), (14, 5), (9, 1), (1, 3)]
)
def test_bicubic_matrix_equals_torch_interpolation(old: int, new: int) -> None:
    matrix = bicubic_matrix(old, new, torch.device("cpu"))
    image = torch.randn(1, 3, old, 5, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(
        image, size=(new, 5), mode="bicubic", antialias=True, align_corners=False
    )
    torch.testing.assert_close(matrix @ image, expected, atol=1e-5, rtol=0)
    assert torch.equal(matrix, torch.eye(old)) == (old == new)
    torch.testing.assert_close(matrix.sum(1), torch.ones(new))
