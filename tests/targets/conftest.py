"""Shared SAN of mmsegmentation: building it takes long, and no test changes it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import Tensor, nn

from tests.targets.by_hand import lively_tower, load_pictures, needs_mmseg

CLASSES = ("person", "tree", "sky")
VIT_B = {"width": 768, "depth": 12, "heads": 12, "patch": 16, "size": 224, "outputs": 512}


@pytest.fixture(scope="session")
def vit_b() -> dict[str, Tensor]:
    """Build a tower of the sizes of ViT-B/16."""
    return lively_tower(**VIT_B, mlp=3072, seed=0)


@pytest.fixture(scope="session")
def _san(vit_b: dict[str, Tensor]) -> nn.Module:
    needs_mmseg()
    from ovsprune.targets.mmseg_build import build_san, load_tower, scale_bias

    model = build_san(CLASSES, seed=0)
    load_tower(model, vit_b)
    scale_bias(model, load_pictures(1, 320), std=2.0)
    return model


@pytest.fixture
def san(_san: nn.Module) -> Iterator[nn.Module]:
    """Build SAN from mmsegmentation's san_vit-b16.py, with that tower."""
    before = {name: (id(t), t._version) for name, t in _san.state_dict(keep_vars=True).items()}
    yield _san
    after = {name: (id(t), t._version) for name, t in _san.state_dict(keep_vars=True).items()}
    assert after == before, "a test changed the shared model"
