"""What a framework costs under each mask: parameters, MACs, and time measured side by side.

All four stand in one process and take turns, so that what else runs on the machine meets them
alike; times are medians, and what the page compares is their ratio to the dense one's.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from assemble import assemble
from frameworks import FRAMEWORKS
from masks import folder_of
from plan import MASKS, TRAINED_AT, Run
from training import write_row

ROUNDS = 15


def costs(framework: str, text: torch.Tensor, work: Path, sparsity: float) -> dict[str, Any]:
    """Costs of a framework by mask, measured once into ``work``."""
    file = work / "costs" / f"{framework}-{sparsity:g}.json"
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    from ovsprune.graph.costs import macs

    backbone = FRAMEWORKS[framework].backbone
    record = json.loads((folder_of(work, backbone, sparsity) / "masks.json").read_text())
    made = {m: assemble(Run(framework, m), len(text), work, sparsity) for m in MASKS}
    image = torch.randn(1, 3, 192, 192, generator=torch.Generator().manual_seed(0))
    runs: dict[str, Any] = {}
    for mask, item in made.items():
        module = item.module.eval()
        tower = sum(p.numel() for n, p in item.holder.named_parameters() if n in item.tower)
        runs[mask] = {
            "params": sum(p.numel() for p in module.parameters()),
            "tower_params": tower,
            "tower_nonzero": tower - item.zeros,
            "macs": macs(_Predict(copy.deepcopy(module)), image, text),
            "milliseconds": [],
        }
    with torch.no_grad():
        for turn in range(ROUNDS + 2):
            for mask, item in made.items():
                start = time.perf_counter()
                item.module.predict(image, text)
                if turn >= 2:  # the first turns warm up
                    runs[mask]["milliseconds"].append(1e3 * (time.perf_counter() - start))
    for found in runs.values():
        found["milliseconds"] = statistics.median(found["milliseconds"])
    row = {"framework": framework, "sparsity": record["sparsity"], "masks": runs}
    write_row(file, row)
    return row


def all_costs(text: torch.Tensor, work: Path) -> list[dict[str, Any]]:
    """Of every framework whose masks are there."""
    return [
        costs(name, text, work, TRAINED_AT)
        for name, framework in FRAMEWORKS.items()
        if (folder_of(work, framework.backbone, TRAINED_AT) / "masks.json").exists()
    ]


class _Predict(torch.nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: torch.Tensor, text: torch.Tensor) -> Any:
        return self.module.predict(images, text)
