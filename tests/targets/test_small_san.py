"""Recovery in a small SAN around the embedded model: masks and logits stay close."""

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
    from ovsprune.backbones import load_backbone

    return load_backbone("tiny")


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
        load_tower,
        scale_bias,
        set_class_embeddings,
    )

    names = list(CLASS_NAMES)
    tower = tiny.tower.state_dict()
    heads = tiny.tower.transformer.resblocks[0].attn.num_heads
    shape = SanShape.small(
        tower, heads=heads, size=tiny.preprocess.size[0], activation=tiny.activation
    )
    model = build_san(names, shape)
    load_tower(model, tower)
    texts = tiny.encode_text([f"a photo of a {name}" for name in names])
    set_class_embeddings(model, dict(zip(names, texts, strict=True)), 100.0)
    scale_bias(model, images, std=1.0)
    return model


def change(
    tiny: Any, san: nn.Module, images: Tensor, output: Path, **options: Any
) -> dict[str, float]:
    """Return the change of masks and logits in standard deviations (root mean square)."""
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


@pytest.mark.slow
def test_recovery_keeps_masks_and_logits_close(
    tmp_path: Path, tiny: Any, san: nn.Module, images: Tensor
) -> None:
    repaired = change(tiny, san, images, tmp_path / "repaired")
    bare = change(tiny, san, images, tmp_path / "bare", criterion="random", recovery="none")
    print(repaired, bare)
    for name in ("masks", "logits"):
        assert repaired[name] < 0.5, "half of the MACs are gone; the output should be much the same"
        assert repaired[name] < 0.6 * bare[name]


def test_training_steps_bring_its_losses_down(
    tiny: Any, san: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    """Trains with the framework's losses on labelled images; the slim tower changes too."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    from ovsprune.calibration.scenes import render_scene
    from ovsprune.jobs.prune import prune
    from ovsprune.jobs.transfer import transfer

    prune(
        tiny, 0.5, samples=8, criterion="magnitude", allocation="uniform", recovery="none",
        output=tmp_path / "slim",
    )  # fmt: skip
    samples = []
    for i in range(2):
        label = torch.from_numpy(render_scene(i, split="test", size=112).labels)[None, None].float()
        label = F.interpolate(label, size=images.shape[-2:], mode="nearest")[0].long()
        shape = tuple(images.shape[-2:])
        samples.append(
            SegDataSample(
                gt_sem_seg=PixelData(data=label),
                metainfo={"img_shape": shape, "ori_shape": shape, "pad_shape": shape},
            )
        )
    torch.manual_seed(0)
    with transfer(san, tmp_path / "slim") as attached:
        assert attached.target == "mmseg-san"
        learning = [p for n, p in san.named_parameters() if not n.startswith("text_encoder")]
        before = [p.detach().clone() for p in learning]
        asked = [p.requires_grad for p in learning]
        try:
            for parameter in learning:
                parameter.requires_grad_(True)
            optimizer = torch.optim.AdamW(learning, lr=2e-4)
            totals = []
            for _ in range(8):
                losses = san.loss(images[:2], samples)
                total = sum(v for name, v in losses.items() if "loss" in name)
                totals.append(float(total.detach()))
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
        finally:
            with torch.no_grad():
                for parameter, value, flag in zip(learning, before, asked, strict=True):
                    parameter.copy_(value).requires_grad_(flag).grad = None
    assert all(torch.tensor(totals).isfinite())
    assert min(totals[-2:]) < 0.9 * totals[0]
    print(f"losses {totals[0]:.2f} -> {totals[-1]:.2f}")
