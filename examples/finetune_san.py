"""Finetune a slim SAN of mmsegmentation by a schedule: only the layers that the policy chooses.

python examples/prune.py                     # writes slim/example
python examples/finetune_san.py --slim slim/example --policy alpha
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import Tensor, nn

import ovsprune
from ovsprune.backbones import load_backbone as load_model
from ovsprune.calibration.scenes import CLASS_NAMES, render_scene
from ovsprune.evaluation.zero_shot import prepare_image
from ovsprune.targets.mmseg_build import SanShape, build_san, load_tower


def slim_san(slim: Path) -> nn.Module:
    """A SAN around the model that was pruned, made slim; yours comes from your configuration."""
    dense = load_model(ovsprune.read(slim).spec.base.model)
    tower = dense.tower.state_dict()
    heads = dense.tower.get_submodule("transformer.resblocks.0.attn").num_heads
    size = dense.preprocess.size[0]
    shape = SanShape.small(tower, heads=heads, size=size, activation=dense.activation)
    model = build_san(list(CLASS_NAMES), shape)
    load_tower(model, tower)
    ovsprune.transfer(model, slim)
    return model


def scene(model: nn.Module, index: int) -> tuple[Tensor, SegDataSample]:
    """A picture and its labels, as mmsegmentation wants them; yours come from your data."""
    made = render_scene(index, split="train", size=256)
    picture = prepare_image(made.image, load_model("tiny").preprocess)[None]
    side = 2 * picture.shape[-1]
    picture = nn.functional.interpolate(picture, size=side, mode="bilinear")
    labels = torch.as_tensor(made.labels)[None, None].float()
    labels = nn.functional.interpolate(labels, size=side, mode="nearest")[0].long()
    sample = SegDataSample(gt_sem_seg=PixelData(data=labels))
    sample.set_metainfo({"img_shape": (side, side), "ori_shape": (side, side)})
    return picture, sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slim", type=Path, default=Path("slim/example"))
    parser.add_argument("--policy", default="alpha", help="`ovsprune schedule --list` shows them")
    parser.add_argument("--fraction", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=6)
    given = parser.parse_args()

    model = slim_san(given.slim).train()
    plan = ovsprune.schedule(model, given.policy, fraction=given.fraction, total_steps=given.steps)
    # As SAN does it, what has "image_encoder" in its name learns more slowly.
    optimizer = torch.optim.AdamW(plan.groups(lr=1e-4, multipliers={"image_encoder.*": 0.1}))
    plan.bind(optimizer)
    print(plan)

    picture, sample = scene(model, 0)

    def loss() -> Tensor:
        losses = model.loss(picture, [sample])
        return sum(value for name, value in losses.items() if "loss" in name)

    flops = plan.training_flops(loss)
    print(f"a step: {flops.step / 1e9:.1f} GFLOPs, {flops.weights / 1e9:.1f} of them for weights")
    for step in range(given.steps):
        plan.step(step)
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        print(f"step {step}: loss {value.item():.2f}")


if __name__ == "__main__":
    main()
