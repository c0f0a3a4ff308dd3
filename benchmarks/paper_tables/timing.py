"""What a framework costs under each mask, and a training step by policy: measured side by side.

What is compared stands in one process and takes turns, so that what else runs on the machine meets
all alike; times are medians, and what the page compares is the median of a turn's ratios.
"""

from __future__ import annotations

import copy
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from assemble import Assembled, assemble
from frameworks import FRAMEWORKS
from masks import FOLDERS, folder_of
from plan import MASKS, POLICIES, SCHEDULED, TRAINED_AT, Run
from torch import nn
from torch.utils.hooks import RemovableHandle
from training import (
    Settings,
    one_step,
    optimizer_of,
    photographs,
    schedule_of,
    vocabulary,
    write_row,
)

from ovsprune.jobs.schedule import layer_alphas

ROUNDS = 60
STEPS_TIMED = 20


def costs(framework: str, text: torch.Tensor, work: Path, sparsity: float) -> dict[str, Any]:
    """Costs of a framework by mask, measured once into ``work``."""
    file = work / "costs" / f"{framework}-{sparsity:g}.json"
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    from ovsprune.graph.costs import macs

    record = _masks(framework, work, sparsity)
    assert record is not None
    made = {m: assemble(Run(framework, m), len(text), work, sparsity) for m in MASKS}
    image = torch.randn(1, 3, 192, 192, generator=torch.Generator().manual_seed(0))
    runs: dict[str, Any] = {}
    for mask, item in made.items():
        module = item.module.eval()
        tower = sum(p.numel() for n, p in item.holder.named_parameters() if n in item.tower)
        done = macs(_Predict(copy.deepcopy(module)), image, text)
        runs[mask] = {
            "params": _that_run(item),
            "nonzero": _that_run(item) - item.zeros,
            "tower_params": tower,
            "tower_nonzero": tower - item.zeros,
            "macs": done,
            "nonzero_macs": done - _spared(item, image, text),
            "milliseconds": [],
        }
    order, shuffled = list(made), random.Random(0)
    with torch.no_grad():
        for turn in range(ROUNDS + 2):
            shuffled.shuffle(order)  # what ran before is in the caches
            for mask in order:
                start = time.perf_counter()
                made[mask].module.predict(image, text)
                if turn >= 2:  # the first turns warm up
                    runs[mask]["milliseconds"].append(1e3 * (time.perf_counter() - start))
    times = {mask: found["milliseconds"] for mask, found in runs.items()}
    for mask, found in runs.items():
        found["milliseconds"] = statistics.median(times[mask])
        found["of_dense"] = _ratio(times[mask], times["dense"])
    row = {"framework": framework, "sparsity": record["sparsity"], "masks": runs}
    write_row(file, row)
    return row


def _ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The median of a turn's ratio: what slows a turn down slows both."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def _that_run(item: Assembled) -> int:
    """Parameters of what runs: the tower without an idle pool, and all that trains."""
    names = {id(p): n for n, p in item.holder.named_parameters()}
    return sum(
        p.numel()
        for p in item.module.parameters()
        if names.get(id(p)) in item.tower or (p.requires_grad and names.get(id(p)) not in item.idle)
    )


@torch.no_grad()
def _spared(item: Assembled, image: torch.Tensor, text: torch.Tensor) -> int:
    """MACs of the zeros, which the paper does not count: each weight once a position."""
    positions: dict[str, int] = {}

    def watched(name: str) -> RemovableHandle:
        path = name.rpartition(".")[0]
        owner, above = (item.holder.get_submodule(p) for p in (path, path.rpartition(".")[0]))
        if isinstance(above, nn.MultiheadAttention):
            owner = above  # it reads its output projection's weight without calling it

        def seen(module: nn.Module, given: Any, out: Any) -> None:
            first = out[0] if isinstance(out, tuple) else out
            channels = first.shape[1] if isinstance(module, nn.Conv2d) else first.shape[-1]
            positions[name] = first.numel() // channels

        return owner.register_forward_hook(seen)

    handles = [watched(name) for name in item.masks]
    item.module.predict(image, text)
    for handle in handles:
        handle.remove()
    return sum(int((~mask).sum()) * positions[name] for name, mask in item.masks.items())


def all_costs(text: torch.Tensor, work: Path) -> list[dict[str, Any]]:
    """Of every framework whose masks are there."""
    there = [name for name in FRAMEWORKS if _masks(name, work, TRAINED_AT) is not None]
    return [costs(name, text, work, TRAINED_AT) for name in there]


def steps(data: Path, work: Path) -> dict[str, Any] | None:
    """Milliseconds of a training step by policy, and of a look at the spectra, into ``work``."""
    file = work / "steps" / f"{SCHEDULED}-{TRAINED_AT:g}.json"
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    if _masks(SCHEDULED, work, TRAINED_AT) is None:
        return None
    from data import batch

    photos, settings = photographs(data), Settings()
    text = vocabulary(photos)
    ready = {}
    for policy in POLICIES:
        run = Run(SCHEDULED, "structured", policy)
        made = assemble(run, len(text), work)
        optimizer, plan = optimizer_of(made, settings), schedule_of(made, run, settings)
        plan.bind(optimizer)
        ready[policy] = (made.module.train(), optimizer, plan)
    times: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    order, shuffled = list(ready), random.Random(0)
    for turn in range(STEPS_TIMED + 2):
        found = batch(photos, turn, settings.batch, 0)
        shuffled.shuffle(order)
        for policy in order:
            module, optimizer, plan = ready[policy]
            start = time.perf_counter()
            one_step(module, optimizer, plan, found, text, turn, 0, settings)
            if turn >= 2:  # the first turns warm up
                times[policy].append(1e3 * (time.perf_counter() - start))
    module, _, plan = ready["alpha-refresh"]
    looks = []
    for _ in range(3):
        start = time.perf_counter()
        layer_alphas(plan.model, [layer.name for layer in plan.layers])
        looks.append(1e3 * (time.perf_counter() - start))
    row = {
        "framework": SCHEDULED,
        "refresh": statistics.median(looks),
        "milliseconds": {policy: statistics.median(found) for policy, found in times.items()},
        "of_all": {policy: _ratio(found, times["all"]) for policy, found in times.items()},
    }
    write_row(file, row)
    return row


def _masks(framework: str, work: Path, sparsity: float) -> dict[str, Any] | None:
    """The record of a framework's masks, if they and the tower are there."""
    backbone = FRAMEWORKS[framework].backbone
    file = folder_of(work, backbone, sparsity) / "masks.json"
    if not file.exists() or not FOLDERS[backbone].is_dir():
        return None
    record: dict[str, Any] = json.loads(file.read_text())
    return record if record["reached"] else None


class _Predict(torch.nn.Module):
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: torch.Tensor, text: torch.Tensor) -> Any:
        return self.module.predict(images, text)
