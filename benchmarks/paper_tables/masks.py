"""Finds each mask once, on the plain tower: structured, the paper's IMP, and random ones.

The structured tower is this project's default, its budget the MACs; the ratio is searched that
leaves the wanted share of the weights that IMP ranks. The unstructured masks then get exactly as
many zeros as the structured tower lost parameters, so that all towers have equally many non-zeros.
IMP and random masks go on the dense weights, as OpenTrans transfers its masks; what IMP's own
training of the weights gives is reported beside it, before any framework.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from places import KEPT, PHOTO, RESNET
from plan import TRAINED_AT
from torch import Tensor

FOLDERS = {"vit": PHOTO, "resnet": RESNET}
RANKED_NOT = {"vit": (), "resnet": ("attnpool.*",)}
"""Weights that no method touches: what the paper ranks is the convolutions."""
SAMPLES = 256
IMP = {"steps": 100, "batch": 8}
"""A round's. The paper takes 5,000 steps."""
NEAR, TRIES = 0.01, 8
FIRST = 0.86
"""The first ratio of MACs tried, as a share of the sparsity: on ``photo`` 0.44 gave 0.51."""


def ranked(backbone: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that may be zero: what IMP ranks."""
    from fnmatch import fnmatchcase

    from ovsprune import backbones
    from ovsprune.graph.products import find_products

    loaded = backbones.load_backbone(str(FOLDERS[backbone]))
    products = find_products(loaded.tower, loaded.preprocess.size)[1:]
    return {
        p.name: p.shape
        for p in products
        if not any(fnmatchcase(p.name, pattern) for pattern in RANKED_NOT[backbone])
    }


def random_masks(shapes: Mapping[str, tuple[int, ...]], zeros: int, seed: int) -> dict[str, Tensor]:
    """Masks with exactly ``zeros`` zeros, anywhere in all weights together."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    generator = torch.Generator().manual_seed(seed)
    flat = torch.ones(sum(sizes), dtype=torch.bool)
    flat[torch.randperm(len(flat), generator=generator)[:zeros]] = False
    parts = flat.split(sizes)
    return {n: part.view(s) for (n, s), part in zip(shapes.items(), parts, strict=True)}


def folder_of(work: Path, backbone: str, sparsity: float) -> Path:
    """Where the masks of a tower at a sparsity are."""
    return work / "masks" / f"{backbone}-{sparsity:g}"


def find(backbone: str, sparsity: float, data: Path, work: Path) -> dict[str, Any]:
    """Structured and IMP's masks in their folder, found if they are not there yet.

    Returns:
        The record; where the structured tower cannot lose so much, ``reached`` is false in it, and
        IMP's masks have the share of zeros that was asked for.
    """
    place = folder_of(work, backbone, sparsity)
    record = place / "masks.json"
    pictures = calibration(data, work)
    if not record.exists() and kept(backbone, sparsity).is_dir():
        shutil.copytree(kept(backbone, sparsity), place, dirs_exist_ok=True)
    if record.exists():
        found: dict[str, Any] = json.loads(record.read_text())
        if (found["tower"], found["imp"]) != (tower_hash(backbone), IMP):
            raise SystemExit(
                f"{place} has masks of another {backbone} tower, or by other steps: remove it, and "
                f"{kept(backbone, sparsity)}"
            )
        if not found["reached"]:
            print(f"{backbone} {sparsity}: no structured tower loses so much", flush=True)
        return found
    place.mkdir(parents=True, exist_ok=True)
    shapes = ranked(backbone)
    total = sum(math.prod(shape) for shape in shapes.values())
    found = _structured(backbone, sparsity, total, pictures, place)
    rounds = work / "rounds" / f"{backbone}.safetensors"
    found |= _imp(backbone, found["zeros"] / total, pictures, place, rounds)
    if found["imp_zeros"] != found["zeros"]:
        raise SystemExit(f"IMP has {found['imp_zeros']} zeros, expected {found['zeros']}")
    partial = record.with_suffix(".part")
    found |= {"backbone": backbone, "tower": tower_hash(backbone), "imp": IMP, "ranked": total}
    partial.write_text(json.dumps(found, indent=2))
    os.replace(partial, record)
    if found["reached"] and sparsity == TRAINED_AT:
        keep(backbone, sparsity, place)
    return find(backbone, sparsity, data, work)


def tower_hash(backbone: str) -> str:
    """Of the weights that masks are found on."""
    from ovsprune.slim.read import file_digest

    return file_digest(FOLDERS[backbone] / "open_clip_model.safetensors")[:16]


def kept(backbone: str, sparsity: float) -> Path:
    """Where the masks lie that other machines go on with."""
    return KEPT / f"{backbone}-{sparsity:g}"


def keep(backbone: str, sparsity: float, place: Path) -> None:
    """Put what frameworks are trained from beside the scripts: the slim tower, and IMP's masks."""
    from ovsprune.masks import read_masks, write_masks

    final = kept(backbone, sparsity)
    partial = final.with_suffix(".part")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(place / "structured", partial / "structured")
    write_masks(partial / "imp.safetensors", read_masks(place / "imp"))
    shutil.copyfile(place / "masks.json", partial / "masks.json")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)


def imp_file(place: Path) -> Path:
    """IMP's masks: with the weights of its rounds where they were found, else alone."""
    return place / "imp" if (place / "imp").is_dir() else place / "imp.safetensors"


def calibration(data: Path, work: Path) -> str:
    """Pictures without labels: of MSRC's train list."""
    from quality import linked, listed

    pictures = listed(data / "msrc" / "images", data / "msrc" / "train.txt")
    return str(linked(work / "calibration", pictures))


def _structured(
    backbone: str, sparsity: float, total: int, pictures: str, place: Path
) -> dict[str, Any]:
    """The default prune whose lost parameters are nearest to ``sparsity`` of the ranked weights."""
    import ovsprune
    from ovsprune import backbones
    from ovsprune.core.errors import BudgetError

    model = backbones.load_backbone(str(FOLDERS[backbone]))
    low, high, tries = (0.0, 0.0), (1.0, 1.0), []  # ratio and sparsity that are known
    ratio = FIRST * sparsity
    final = place / "structured"
    dense: dict[str, int] = {}
    for _ in range(TRIES):
        try:
            result = ovsprune.prune(
                model,
                round(ratio, 4),
                calibration=pictures,
                samples=SAMPLES,
                statistics=str(place / "statistics.safetensors"),
                dtype="float16",
                output=place / "try",
                overwrite=True,
            )
        except BudgetError as error:
            tries.append({"ratio": ratio, "error": str(error)})
            high = (ratio, 1.0)
        else:
            dense = {"macs": result.spec.dense.macs, "params": result.spec.dense.params}
            zeros = dense["params"] - result.spec.slim.params
            tries.append({"ratio": ratio, "zeros": zeros, "sparsity": zeros / total})
            print(f"{backbone} {sparsity}: ratio {ratio:.4f} gives {zeros / total:.4f}", flush=True)
            if abs(zeros / total - sparsity) <= NEAR:
                shutil.rmtree(final, ignore_errors=True)
                os.replace(place / "try", final)
                return {
                    "reached": True,
                    "macs_ratio": round(ratio, 4),
                    "zeros": zeros,
                    "sparsity": zeros / total,
                    "dense": dense,
                    "slim": {"macs": result.spec.slim.macs, "params": result.spec.slim.params},
                    "structured_seconds": sum(result.seconds.values()),
                    "tries": tries,
                }
            known = (ratio, zeros / total)
            low, high = (known, high) if zeros / total < sparsity else (low, known)
        ratio = between(low, high, sparsity)
    shutil.rmtree(place / "try", ignore_errors=True)
    zeros = round(sparsity * total)
    return {"reached": False, "zeros": zeros, "dense": dense, "tries": tries}


def between(low: tuple[float, float], high: tuple[float, float], sparsity: float) -> float:
    """The ratio between two known ones where a straight line reaches ``sparsity``.

    >>> between((0.0, 0.0), (0.5, 0.8), 0.4)
    0.25
    """
    share = (sparsity - low[1]) / max(high[1] - low[1], 1e-9)
    return low[0] + min(max(share, 0.05), 0.95) * (high[0] - low[0])


def _imp(backbone: str, ratio: float, pictures: str, place: Path, rounds: Path) -> dict[str, Any]:
    """The paper's masks, of exactly as many zeros; the next sparsity goes on from these rounds."""
    from ovsprune.baselines.imp_weights import imp

    result = imp(
        str(FOLDERS[backbone]),
        ratio,
        calibration=pictures,
        samples=SAMPLES,
        batch_size=IMP["batch"],
        imp_steps=IMP["steps"],
        imp_rounds=str(rounds),
        protect=RANKED_NOT[backbone],
        output=place / "imp",
        overwrite=True,
    )
    return {
        "imp_zeros": sum(w.zeros for w in result.spec.weights),
        "imp_nonzero": {"macs": result.spec.nonzero.macs, "params": result.spec.nonzero.params},
        "imp_rounds": len(result.rounds),
        "imp_seconds": sum(result.seconds.values()),
    }
