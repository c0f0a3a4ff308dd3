"""The towers as they come out of pruning: scored by themselves, with nothing trained after it.

This is where 0.7 and 0.9 are reported, and where the part that the repair of the weights has is
told from the part of the choice: IMP's mask stands on the dense weights (as it is transferred) and
on those that its own rounds left; structured towers stand with and without their repair, and so do
units chosen at random. Batch norms of masked or unrepaired weights get the statistics of what they
read then, from the pictures that the masks were found on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import norms
import torch
from masks import FOLDERS, SAMPLES, calibration, folder_of, imp_file, random_masks, ranked
from training import SETS, score, write_row

SEEDS = 3
"""Of what is chosen at random."""
LOT = "random units + closed-form"
"""What structured towers are judged against: units by lot, and the same kind of repair."""


class Tower:
    """A tower as something that predicts: MaskCLIP's reading of its dense output."""

    def __init__(self, backbone: Any) -> None:
        self.backbone = backbone

    def eval(self) -> None:
        self.backbone.tower.eval()

    def predict(self, images: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        dense = torch.nn.functional.normalize(self.backbone.dense(images), dim=1)
        return torch.einsum("bchw,kc->bkhw", dense, text)


def tower_file(work: Path, backbone: str, sparsity: float) -> Path:
    """Where the rows of a tower at a sparsity are."""
    return work / "towers" / f"{backbone}-{sparsity:g}.json"


def towers(backbone: str, sparsity: float, data: Path, work: Path) -> list[dict[str, Any]]:
    """A row a tower, scored once into ``work``."""
    file = tower_file(work, backbone, sparsity)
    if file.exists():
        rows: list[dict[str, Any]] = json.loads(file.read_text())
        return rows
    rows = []
    for mask, seed, loaded in _pruned(backbone, sparsity, data, work):
        key = {"backbone": backbone, "sparsity": sparsity, "mask": mask, "seed": seed}
        key |= _size(backbone, sparsity, mask, seed, work)
        if isinstance(loaded, str):
            rows.append({**key, "refused": loaded})
            continue
        scores = {s: score(Tower(loaded), s, data) for s in SETS}
        rows.append({**key, "scores": scores, "relative_error": _error(backbone, loaded, data)})
    write_row(file, rows)  # type: ignore[arg-type]
    return rows


def _pruned(
    backbone: str, sparsity: float, data: Path, work: Path
) -> Iterator[tuple[str, int, Any]]:
    """Each tower with its name and seed; for one that cannot be had, the reason."""
    import ovsprune
    from ovsprune import backbones
    from ovsprune.masks import apply_masks, read_masks, read_weights

    place = folder_of(work, backbone, sparsity)
    found = json.loads((place / "masks.json").read_text())

    def dense() -> Any:
        return backbones.load_backbone(str(FOLDERS[backbone]))

    def masked(masks: dict[str, torch.Tensor]) -> Any:
        loaded = dense()
        apply_masks(loaded.tower, masks)
        norms.refresh(loaded.tower, work)
        return loaded

    def unrepaired(folder: Path) -> Any:
        loaded = dense()
        ovsprune.apply(loaded.tower, ovsprune.read(folder), weights="target")
        norms.refresh(loaded.tower, work)
        return loaded

    yield "dense", 0, dense()
    for seed in range(SEEDS):
        yield "random mask", seed, masked(random_masks(ranked(backbone), found["zeros"], seed))
    yield "IMP mask", 0, masked(dict(read_masks(imp_file(place))))
    if (place / "imp").is_dir():
        loaded = dense()
        state = {n.removeprefix("visual."): t for n, t in read_weights(place / "imp").items()}
        loaded.tower.load_state_dict(state)
        yield "IMP, its own weights", 0, loaded
    for seed in range(SEEDS):
        folder = place / f"random-{seed}"
        refused = _random_units(backbone, found, seed, data, work, folder)
        yield "random units", seed, refused or unrepaired(folder)
        yield LOT, seed, refused or backbones.load_backbone(str(folder))
    folder = place / "structured"
    refused = "" if found["reached"] else "no ratio of MACs leaves out so many weights"
    yield "structured, not repaired", 0, refused or unrepaired(folder)
    yield "structured", 0, refused or backbones.load_backbone(str(folder))


def _random_units(
    backbone: str, found: dict[str, Any], seed: int, data: Path, work: Path, output: Path
) -> str:
    """Prune units at random, to as many parameters as the structured tower has; why not, if not."""
    import ovsprune
    from ovsprune import backbones
    from ovsprune.core.errors import BudgetError

    try:
        ovsprune.prune(
            backbones.load_backbone(str(FOLDERS[backbone])),
            found["zeros"] / found["dense"]["params"],
            budget="params",
            criterion="random",
            allocation="uniform",
            recovery="closed-form",
            calibration=calibration(data, work),
            samples=SAMPLES,
            seed=seed,
            output=output,
            overwrite=True,
        )
    except BudgetError as error:
        return str(error)
    return ""


def _size(backbone: str, sparsity: float, mask: str, seed: int, work: Path) -> dict[str, int]:
    """Parameters gone and MACs left of whole units' towers, as their checkpoints say."""
    import ovsprune

    if "structured" not in mask and "units" not in mask:
        return {}
    name = "structured" if "structured" in mask else f"random-{seed}"
    folder = folder_of(work, backbone, sparsity) / name
    if not folder.is_dir():
        return {}
    spec = ovsprune.read(folder).spec
    return {"gone": spec.dense.params - spec.slim.params, "macs": spec.slim.macs}


def _error(backbone: str, loaded: Any, data: Path) -> float:
    """Of the dense features, against the dense tower's, on MSRC's test pictures."""
    from quality import listed

    from ovsprune import backbones
    from ovsprune.calibration.fidelity import fidelity
    from ovsprune.calibration.pictures import FilePictures

    dense = backbones.load_backbone(str(FOLDERS[backbone]))
    dense.tower.eval()
    files = listed(data / "msrc" / "images", data / "msrc" / "test.txt")
    pictures = FilePictures(files, dense.preprocess)
    return fidelity(dense.dense, loaded.dense, pictures, batch_size=8).relative_error
