"""Prune a ConvNeXt tower, and put it into open_clip's own model, where FC-CLIP and others read it.

python examples/prune_convnext.py                          # random weights, to see that it works
python examples/prune_convnext.py --model convnext_large_d_320 \
    --pretrained laion2b_s29b_b131k_ft_soup --calibration DIR --samples 256
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
    parser.add_argument("--model", default="convnext_tiny", help="open_clip's name, or a folder")
    parser.add_argument("--pretrained", default="none", help="a tag, a file, or none")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the MACs to remove")
    parser.add_argument("--calibration", default="auto", help="a folder of pictures")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path("slim/convnext"))
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
    for layer in result.spec.layers:
        print(f"{layer.name}: {layer.kept} of {layer.units} units")

    # A framework builds the dense model by itself; its tower is slimmed in place.
    folder = Path(given.model).is_dir()
    clip = open_clip.create_model(f"local-dir:{given.model}" if folder else given.model).eval()
    images = torch.randn(1, 3, *backbone.preprocess.size)
    with torch.no_grad():
        dense = pyramid(clip.visual, images)
        applied = ovsprune.apply(clip.visual, ovsprune.read(given.output))
        slim = pyramid(clip.visual, images)

    # Only hidden widths were cut: every stage gives what a pixel decoder expects.
    assert [stage.shape for stage in slim] == [stage.shape for stage in dense]
    for stage in slim:
        print(f"stage {tuple(stage.shape)}")
    same = torch.equal(slim[-1], pyramid(result.tower, images)[-1])
    print(f"as the tower that was pruned, bit for bit: {same}")
    applied.detach()
    print(f"saved to {result.path}")


@torch.no_grad()
def pyramid(tower: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """Features of the four stages, as a decoder with several scales reads them."""
    return tower.trunk.forward_intermediates(images, intermediates_only=True)


if __name__ == "__main__":
    main()
