"""One row of a sweep, in a process of its own: ``registry_one.py NAME FOLDER``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ovsprune
from ovsprune import backbones
from ovsprune.backbones import FAMILIES, timm_source, transformers_source
from ovsprune.baselines.torch_pruning import TORCH_PRUNING_METHODS, TorchPruning
from ovsprune.core.errors import OvspruneError
from ovsprune.core.protocols import Backbone
from ovsprune.core.records import Plan
from ovsprune.graph.cut import mask
from ovsprune.graph.groups import find_groups
from ovsprune.pruning import pipeline as steps
from ovsprune.slim.hashing import state_hashes

HERE = Path(__file__).resolve().parent
RATIO, TOLERANCE, ERROR = 0.5, 0.01, 1e-4
MEMORY = 20 * 2**30
COPIES = 5
"""Dense, rewritten, its graph's gradients, masked, slim: how often a tower is held at once."""
FEW = 2
"""Blocks of a stage where the real tower does not fit."""
TEXT = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}
HELD_OUT = 2
"""Pictures for the fidelity, which says nothing of random weights."""


def main(name: str, folder: Path) -> None:
    """Print the row as JSON."""
    try:
        row = run(name, folder)
    except OvspruneError as error:
        row = {"reason": f"{type(error).__name__}: {error}"}
    print(json.dumps(row))


def run(name: str, folder: Path) -> dict[str, Any]:
    """The row's fields."""
    others = name.startswith((transformers_source.PREFIX, timm_source.PREFIX))
    few = not others and not fits(params_of(name))
    with shortened(few):
        backbone = backbones.load_backbone(name, pretrained="none")
        backbone.encoder, backbone.text = None, {}
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(2, 3, *backbone.preprocess.size, generator=generator)
        fill(backbone.tower, images)
        with mock.patch.object(steps, "HELD_OUT", HELD_OUT):
            result = ovsprune.prune(
                backbone,
                RATIO,
                criterion="magnitude",
                allocation="uniform",
                recovery="none",
                samples=1,
                text=False,
                output=folder / "slim",
            )
        save_file({"images": images}, folder / "images.safetensors")
        saved = state_hashes(result.tower.state_dict())
        row: dict[str, Any] = {
            "dense": asdict(result.spec.dense),
            "slim": asdict(result.spec.slim),
            "blocks": f"{FEW} a stage" if few else "all",
            "torch": torch.__version__,
        }
        plan, result = result.plan, None
        wanted, row["stock"] = masked_and_stock(backbone, plan, images)
    del backbone
    command = [sys.executable, str(HERE / "registry_load.py"), str(folder), *["few"] * few]
    subprocess.run(command, check=True)
    loaded = load_file(folder / "out.safetensors")
    row["max_error"] = max(
        float((loaded[key] - wanted[key]).abs().max() / wanted[key].std()) for key in wanted
    )
    return row | verdict(row, saved == json.loads((folder / "hashes.json").read_text()))


def outputs(backbone: Backbone, tower: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Pooled as the tower itself gives it, and dense."""
    return {"pooled": tower(images), "dense": backbone.stages(tower).outputs(images)[1]}


def masked_and_stock(
    backbone: Backbone, plan: Plan, images: Tensor
) -> tuple[dict[str, Tensor], float | None]:
    """Outputs of the dense tower with the cut units masked; what Torch-Pruning removes of it."""
    family, size = FAMILIES.get(backbone.family), backbone.preprocess.size
    dense = deepcopy(backbone.tower)
    family.rewrite(dense)
    seeds = [seed for seed in family.prunable_layers(dense) if seed.name in plan.kept]
    groups = find_groups(dense, seeds, size)
    try:
        stock = TorchPruning(
            "", TORCH_PRUNING_METHODS["torch-pruning-uniform"], backbone.tower, groups, size
        )
        share = stock.prune(RATIO, RATIO).achieved
    except Exception as error:  # whatever another library does
        print(f"Torch-Pruning: {error!r}", file=sys.stderr)
        share = None
    with torch.no_grad():
        mask(dense, groups, plan)
        return outputs(backbone, dense, images), share


def params_of(name: str) -> int:
    """Parameters of the real image tower, counted without building it."""
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        tower = open_clip.model._build_vision_tower(config["embed_dim"], config["vision_cfg"])
    return sum(parameter.numel() for parameter in tower.parameters())


def fits(params: int) -> bool:
    """Whether a tower of so many parameters is built at its real size."""
    return params * 4 * COPIES <= MEMORY


@contextmanager
def shortened(few: bool) -> Iterator[None]:
    """Models are built beside next to no text tower, and with few blocks a stage where wanted."""
    config, create = open_clip.get_model_config, timm.create_model

    def short_config(name: str) -> Any:
        found = deepcopy(config(name))
        if "multimodal_cfg" not in found:  # CoCa's decoder must fit its text tower
            found["text_cfg"] = TEXT
        layers = found["vision_cfg"].get("layers")
        if few and layers is not None:
            found["vision_cfg"]["layers"] = FEW if isinstance(layers, int) else [FEW] * len(layers)
        return found

    def short_model(*given: Any, **options: Any) -> nn.Module:
        for depth in ({"depth": FEW}, {"depths": (FEW,) * 4}) if few else ():
            try:
                return create(*given, **options, **depth)
            except TypeError:
                continue
        return create(*given, **options)

    with (
        mock.patch.object(open_clip, "get_model_config", short_config),
        mock.patch.object(timm, "create_model", short_model),
    ):
        yield


@torch.no_grad()
def fill(tower: nn.Module, images: Tensor) -> None:
    """Give every parameter a value, also those that a library begins with zero or nearly so.

    Running statistics are those of ``images`` [B, 3, H, W], as in a trained tower; with others,
    deep towers blow up rounding by orders of magnitude.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in tower.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        each = parameter.numel() // max(1, *parameter.shape[:1])  # numbers that a row has
        if name.endswith("bias"):
            parameter.copy_(0.1 * noise)
        elif each > 1:
            parameter.copy_(noise * each**-0.5)
        else:  # norms' weights, and scales of what is added to a stream
            parameter.copy_((0.2 if parameter.abs().max() < 0.5 else 1.0) + 0.05 * noise)
    norms = [m for m in tower.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0  # the last batch's alone
    tower(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum


def verdict(row: dict[str, Any], exact: bool) -> dict[str, Any]:
    """Whether all that was wanted holds, and if not, what does not."""
    achieved = 1 - row["slim"]["macs"] / row["dense"]["macs"]
    reasons = []
    if abs(achieved - RATIO) > TOLERANCE:
        reasons.append(f"{achieved:.3f} of the MACs were removed")
    if not row["max_error"] <= ERROR:
        reasons.append(f"the largest error is {row['max_error']:.1e}")
    if not exact:
        reasons.append("what is loaded is not bit for bit what was saved")
    return {"status": "no" if reasons else "ok", "reason": "; ".join(reasons) or None}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
