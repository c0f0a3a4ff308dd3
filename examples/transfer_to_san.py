"""Put a slim tower into SAN: into its checkpoint on disk, and into a live model.

python examples/prune.py                       # writes slim/example
python examples/transfer_to_san.py --slim slim/example
python examples/transfer_to_san.py --slim slim/ViT-B-16-r0.5 --checkpoint san_vit_b_16.pth
python examples/transfer_to_san.py --slim slim/example --live   # needs mmsegmentation
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import ovsprune


def on_disk(slim: Path, checkpoint: Path | None, output: Path) -> None:
    """Write a checkpoint in SAN's key layout, and account for every key."""
    record = ovsprune.transfer(
        slim=slim, target="san", checkpoint=checkpoint, output=output, overwrite=True
    )
    print(f"weights: {record['weights']} ({record['reason']})")
    for part in ("replaced", "kept", "dropped"):
        print(f"{part}: {len(record[part])} keys")
        for key, why in list(record[part].items())[:3]:
            print(f"    {key}: {why}")
    print(f"\nsaved to {record['output']}; add to the training script:\n\n{record['lines']}")


def live(slim: Path) -> None:
    """Slim a SAN of mmsegmentation in place, use it, and get the dense one back."""
    from ovsprune.backbones import load_backbone as load_model
    from ovsprune.targets.mmseg_build import SanShape, build_san, load_tower, run_san

    # A SAN around the dense model that was pruned; yours comes from your own configuration.
    dense = load_model(ovsprune.read(slim).spec.base.model)
    tower = dense.tower.state_dict()
    size = dense.preprocess.size[0]
    heads = dense.tower.get_submodule("transformer.resblocks.0.attn").num_heads
    shape = SanShape.small(tower, heads=heads, size=size, activation=dense.activation)
    model = build_san(["cat", "dog", "grass"], shape)
    load_tower(model, tower)

    images = torch.randn(1, 3, 2 * size, 2 * size)
    before = run_san(model, images)
    with ovsprune.transfer(model, slim) as attached:  # recognises the framework
        after = run_san(model, images)
        print(f"{attached.target}: {len(attached.replaced)} modules and tensors replaced")
        print(f"parameters {attached.params_before:,} -> {attached.params_after:,}")
        cosine = torch.cosine_similarity(before["masks"].flatten(), after["masks"].flatten(), dim=0)
        print(f"cosine of the mask proposals {cosine:.4f}")
    again = run_san(model, images)  # leaving the block detached it
    print(f"dense again, bit for bit: {torch.equal(again['masks'], before['masks'])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slim", type=Path, default=Path("slim/example"))
    parser.add_argument("--checkpoint", type=Path, help="SAN's own .pth, to carry the slim tower")
    parser.add_argument("--output", type=Path, default=Path("transfer/example"))
    parser.add_argument(
        "--live", action="store_true", help="also slim a live SAN in mmsegmentation"
    )
    given = parser.parse_args()
    on_disk(given.slim, given.checkpoint, given.output)
    if given.live:
        live(given.slim)


if __name__ == "__main__":
    main()
