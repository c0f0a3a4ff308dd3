"""The towers as they come out of pruning: scored by themselves, with nothing trained after it.

This is where 0.7 and 0.9 are reported, and where the part that the repair of the weights has is
told from the part of the mask: IMP's mask stands on the dense weights (as it is transferred) and
on those that its own rounds left. Batch norms of masked dense weights get the statistics of what
they read then, from the pictures that the masks were found on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import norms
import torch
from masks import FOLDERS, folder_of, imp_file, random_masks, ranked
from training import SETS, score, write_row

BARE = "structured, not repaired"


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
    import ovsprune
    from ovsprune import backbones
    from ovsprune.masks import apply_masks, read_masks, read_weights

    place = folder_of(work, backbone, sparsity)
    found = json.loads((place / "masks.json").read_text())
    dense = str(FOLDERS[backbone])
    masks = {"dense": {}, "imp": dict(read_masks(imp_file(place)))}
    for seed in range(3):
        masks[f"random-{seed}"] = random_masks(ranked(backbone), found["zeros"], seed)
    rows = []
    own = ["imp, its own weights"] if (place / "imp").is_dir() else []
    for name in (*masks, *own, BARE, "structured"):
        loaded = backbones.load(str(place / "structured") if name == "structured" else dense)
        if masks.get(name):
            apply_masks(loaded.tower, masks[name])
            norms.refresh(loaded.tower, work)
        elif name == "imp, its own weights":
            state = {n.removeprefix("visual."): t for n, t in read_weights(place / "imp").items()}
            loaded.tower.load_state_dict(state)
        elif name == BARE:
            ovsprune.apply(loaded.tower, ovsprune.read(place / "structured"), weights="target")
            norms.refresh(loaded.tower, work)
        scores = {s: score(Tower(loaded), s, data) for s in SETS}
        rows.append({"backbone": backbone, "sparsity": sparsity, "mask": name, "scores": scores})
    write_row(file, rows)  # type: ignore[arg-type]
    return rows
