"""Prune an image tower, read the slim checkpoint back, and compare both on a picture.

python examples/prune.py                                   # the embedded model, in a minute
python examples/prune.py --model ViT-B/16 --calibration DIR # OpenAI's weights, your pictures
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import ovsprune
from ovsprune.backbones import load_backbone as load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the MACs to remove")
    parser.add_argument("--calibration", default="auto", help="a folder of pictures")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("slim/example"))
    given = parser.parse_args()

    # One call does the whole job. Nothing is trained, and no label is needed.
    result = ovsprune.prune(
        given.model,
        given.ratio,
        calibration=given.calibration,
        samples=given.samples,
        output=given.output,
        overwrite=True,
    )
    record = result.record()
    print(f"MACs {record['dense']['macs']:,} -> {record['slim']['macs']:,}")
    print(f"parameters {record['dense']['params']:,} -> {record['slim']['params']:,}")
    print(f"cosine of the dense features on held-out pictures {record['fidelity']['cosine']:.4f}")

    # The slim tower needs torch and safetensors alone; `dense` is what a segmenter reads.
    tower = ovsprune.load(given.output)
    images = torch.randn(1, 3, *tower.spec.preprocess.size)
    features = tower.dense(images)
    print(f"dense features {tuple(features.shape)}")

    # The same pictures through the dense model: what the slim one stands in for.
    reference = load_model(given.model).dense(images)
    assert features.shape == reference.shape
    print(f"saved to {result.path}")


if __name__ == "__main__":
    main()
