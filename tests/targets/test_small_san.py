"""A small SAN around the embedded model: with recovery on, masks and logits stay close."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.targets.by_hand import needs_mmseg

pytestmark = pytest.mark.framework


@pytest.fixture(scope="module")
def tiny() -> Any:
    from ovsprune.backbones import load

    return load("tiny")


@pytest.fixture(scope="module")
def images(tiny: Any) -> Tensor:
    from ovsprune.calibration.scenes import render_scene
    from ovsprune.evaluation.zero_shot import prepare_image

    scenes = [render_scene(i, split="test", size=112).image for i in range(4)]
    pictures = torch.stack([prepare_image(scene, tiny.preprocess) for scene in scenes])
    return F.interpolate(pictures, scale_factor=2.0, mode="bilinear")


@pytest.fixture(scope="module")
def san(tiny: Any, images: Tensor) -> nn.Module:
    needs_mmseg()
    from ovsprune.calibration.scenes import CLASS_NAMES
    from ovsprune.targets.mmseg_build import (
        SanShape,
        build_san,
        class_texts,
        put_tower,
        scale_bias,
    )

    names = list(CLASS_NAMES)
    tower = tiny.tower.state_dict()
    heads = tiny.tower.transformer.resblocks[0].attn.num_heads
    shape = SanShape.small(
        tower, heads=heads, size=tiny.preprocess.size[0], activation=tiny.activation
    )
    model = build_san(names, shape)
    put_tower(model, tower)
    texts = tiny.encode_text([f"a photo of a {name}" for name in names])
    class_texts(model, dict(zip(names, texts, strict=True)), 100.0)
    scale_bias(model, images, std=1.0)
    return model


def change(
    tiny: Any, san: nn.Module, images: Tensor, output: Path, **options: Any
) -> dict[str, float]:
    """How far masks and logits move, in standard deviations (root mean square)."""
    from ovsprune.jobs.prune import prune
    from ovsprune.jobs.transfer import transfer
    from ovsprune.targets.mmseg_build import run_san

    prune(tiny, 0.5, samples=24, allocation="uniform", output=output, **options)
    dense = run_san(san, images)
    with transfer(san, output) as attached:
        assert attached.weights == "slim" and attached.target == "mmseg-san"
        slim = run_san(san, images)
    return {
        name: float((slim[name] - dense[name]).square().mean().sqrt() / dense[name].std())
        for name in ("masks", "logits")
    }


def test_recovery_keeps_masks_and_logits_close(
    tmp_path: Path, tiny: Any, san: nn.Module, images: Tensor
) -> None:
    repaired = change(tiny, san, images, tmp_path / "repaired")
    bare = change(tiny, san, images, tmp_path / "bare", criterion="random", recovery="none")
    print(repaired, bare)
    for name in ("masks", "logits"):
        assert repaired[name] < 0.5, "half of the MACs are gone; the output should be much the same"
        assert repaired[name] < 0.6 * bare[name]
