"""Prune CLIP's residual network, and put it into open_clip's own model, as frameworks build it.

python examples/prune_resnet.py                            # random weights, to see that it works
python examples/prune_resnet.py --model RN50 --pretrained openai --calibration DIR --samples 256
"""

from __future__ import annotations

import argparse
from pathlib import Path

import open_clip
import torch

import ovsprune
from ovsprune.backbones import load_backbone as load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="RN50", help="open_clip's name, or a folder")
    parser.add_argument("--pretrained", default="none", help="a tag, a file, or none")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the MACs to remove")
    parser.add_argument("--calibration", default="auto", help="a folder of pictures")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path("slim/resnet"))
    given = parser.parse_args()

    backbone = load_model(given.model, pretrained=given.pretrained)
    result = ovsprune.prune(
        backbone,
        given.ratio,
        calibration=given.calibration,
        samples=given.samples,
        output=given.output,
        overwrite=True,
    )
    # Two groups in every bottleneck: the channels of its first and of its second convolution.
    for layer in result.spec.layers:
        print(f"{layer.name}: {layer.kept} of {layer.units} channels")

    # A framework builds the dense model by itself; its tower is slimmed in place. What its decoder
    # reads is as wide as before: the stages, and the attention pool with all its heads.
    folder = Path(given.model).is_dir()
    clip = open_clip.create_model(f"local-dir:{given.model}" if folder else given.model).eval()
    images = torch.randn(1, 3, *backbone.preprocess.size)
    with torch.no_grad():
        dense = stages(clip.visual, images)
        applied = ovsprune.apply(clip.visual, ovsprune.read(given.output))
        slim = stages(clip.visual, images)
    assert [stage.shape for stage in slim] == [stage.shape for stage in dense]
    for stage in slim:
        print(f"stage {tuple(stage.shape)}")
    same = torch.equal(slim[-1], stages(result.tower, images)[-1])
    print(f"as the tower that was pruned, bit for bit: {same}")
    applied.detach()

    # Without any library but torch and safetensors, and for another size.
    tower = ovsprune.load(given.output)
    larger = torch.randn(1, 3, *(side + 64 for side in backbone.preprocess.size))
    with torch.no_grad():
        print(f"dense features {tuple(tower.dense(larger).shape)}")
    print(f"saved to {result.path}")


@torch.no_grad()
def stages(tower: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Features of the four stages, as a decoder with several scales reads them."""
    found = [tower.stem(images)]
    for layer in (tower.layer1, tower.layer2, tower.layer3, tower.layer4):
        found.append(layer(found[-1]))
    return found[1:]


if __name__ == "__main__":
    main()
