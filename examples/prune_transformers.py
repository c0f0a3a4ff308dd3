"""Prune a vision tower of transformers, and slim a model that transformers built.

python examples/prune_transformers.py                                       # a small SigLIP, random
python examples/prune_transformers.py --model hf:google/siglip-base-patch16-224
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

import ovsprune

SMALL = Path("small-siglip")


def small_model(folder: Path) -> str:
    """A folder with a SigLIP tower of four blocks, its weights random."""
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=64,
        patch_size=8,
    )
    SiglipVisionModel(config).save_pretrained(folder)
    return f"hf:{folder}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="hf:ORG/REPOSITORY or hf:FOLDER; by default a small one")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of the MACs to remove")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--output", type=Path, default=Path("slim/transformers-example"))
    given = parser.parse_args()
    model = given.model or small_model(SMALL)

    result = ovsprune.prune(
        model, given.ratio, samples=given.samples, output=given.output, overwrite=True
    )
    record = result.record()
    print(f"MACs {record['dense']['macs']:,} -> {record['slim']['macs']:,}")
    print(f"cosine of the dense features on held-out pictures {record['fidelity']['cosine']:.4f}")

    # Built by transformers and narrowed: `.tower.model` is a model of transformers again.
    tower = ovsprune.load(given.output)
    images = torch.randn(1, 3, *tower.spec.preprocess.size)
    print(f"dense features {tuple(tower.dense(images).shape)}")

    # A program that has built the dense model already slims it in place, and gets it back.
    if given.model is None:
        dense = SiglipVisionModel.from_pretrained(SMALL, use_safetensors=True).eval()
        applied = ovsprune.apply(dense, ovsprune.read(given.output))
        with torch.no_grad():
            same = torch.allclose(dense(images).pooler_output, tower(images), atol=1e-5)
        print(f"the model in place gives what the loaded tower gives: {same}")
        applied.detach()
    print(f"saved to {result.path}")


if __name__ == "__main__":
    main()
