"""Make slim checkpoints in the current environment, with reference outputs for the others.

python checkpoints.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from cases import CASES, Case
from safetensors.torch import save_file
from torch import nn
from towers import CONFIG, WEIGHTS, build, masked, outputs

import ovsprune

DENSE, SLIM, REFERENCE = "dense", "slim", "reference.safetensors"
PRUNE = {
    "samples": 16,
    "criterion": "magnitude",
    "allocation": "uniform",
    "recovery": "closed-form",
}


def main(folder: Path) -> None:
    """Make the cases that do not exist yet."""
    for name, case in CASES.items():
        if not (folder / name / REFERENCE).exists():
            print(f"pruning {name} ...", flush=True)
            make(case, folder / name)


@torch.no_grad()
def make(case: Case, directory: Path) -> None:
    """Write the dense model, its slim checkpoint, and the outputs of both."""
    dense, slim = directory / DENSE, directory / SLIM
    dense.mkdir(parents=True, exist_ok=True)
    (dense / WEIGHTS).unlink(missing_ok=True)
    (dense / CONFIG).write_text(json.dumps({"model_cfg": case.config()}), encoding="utf-8")
    model = build(dense)
    generator = torch.Generator().manual_seed(11)
    fill(model, generator)
    size = case.vision["image_size"]
    settle(model.visual, torch.randn(8, 3, size, size, generator=generator))
    save_file(model.state_dict(), dense / WEIGHTS)
    options = {**PRUNE, **case.options}
    result = ovsprune.prune(str(dense), 0.5, output=slim, overwrite=True, **options)

    images = torch.randn(2, 3, size, size, generator=generator)
    words = torch.randint(1, 64, (3, 8), generator=generator)
    checkpoint = ovsprune.read(slim)
    target = masked(model.visual, checkpoint)
    found = {"images": images, "words": words, "text": model.encode_text(words)}
    for name, tower in (("slim", result.tower), ("target", target)):
        pooled, features = outputs(tower, images)
        found |= {f"{name}.pooled": pooled, f"{name}.dense": features}
    save_file({k: v.contiguous() for k, v in found.items()}, directory / REFERENCE)


def fill(model: nn.Module, generator: torch.Generator) -> None:
    """Fill all parameters with random values, also those that a library sets to zero or one."""
    norms = (nn.LayerNorm, nn.BatchNorm2d)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if isinstance(module, norms) and name == "weight":
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.dim() > 1:
                parameter.copy_(1.5 * noise / parameter[0].numel() ** 0.5)
            elif parameter.dim() == 1:
                parameter.copy_(0.2 * noise)


def settle(tower: nn.Module, images: torch.Tensor) -> None:
    """Set the statistics of batch norms from images, so that activations keep their scale."""
    norms = [module for module in tower.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    if norms:
        tower.train()(images)
        tower.eval()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
