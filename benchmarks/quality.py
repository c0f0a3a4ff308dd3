"""What pruning keeps on the trained models, by method: the tables of the documentation.

    python benchmarks/quality.py tiny
    python benchmarks/quality.py photo --data DATA

Every row is kept in ``--work`` as it is done: run again, it goes on where it stopped. Each table
gets the record, the page and the plot of ``ovsprune compare`` in
``benchmarks/quality/<testbed>-<table>/``; rows that are in that record already are not made again,
unless by ``--fresh``, which is wanted once the methods themselves have changed.
DATA is the folder of photographs that ``photo_clip/data.py`` describes.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ovsprune

HERE = Path(__file__).resolve().parent
STOCK = ("torch-pruning", "torch-pruning-taylor", "torch-pruning-isomorphic")
OURS = (
    "default",
    "reconstruction+sensitivity+closed-form",
    "random+gauss-newton",
    "random+closed-form",
    "random",
)
"""What each part of the default brings is in studies.py."""
MODERATE = (*OURS, *STOCK)
HARD = (*OURS, *(f"{name}+gauss-newton" for name in STOCK), *STOCK)
"""Where methods part, every stock selection is followed by our recovery, too."""

TABLES: dict[str, dict[str, tuple[tuple[float, ...], tuple[str, ...]]]] = {
    "tiny": {"30-50": ((0.3, 0.5), MODERATE), "70-85": ((0.7, 0.8, 0.85), HARD)},
    "photo": {"30-50": ((0.3, 0.5), MODERATE), "70-85": ((0.7, 0.79, 0.85), HARD)},
}
"""Ratios and methods by testbed and table. 0.79 is about what stock selections can reach on
``photo``, of whose MACs, its last block's heads kept, no more than 0.833 can be cut at all."""


def testbed(name: str, data: Path | None, work: Path) -> dict[str, Any]:
    """What ``ovsprune.compare`` is given for a testbed.

    The photographs that calibrate ``photo`` are those of MSRC's train list, never its test list.
    """
    if name == "tiny":
        return {"model": "tiny"}
    if data is None:
        raise SystemExit("photo needs --data DATA, the folder of photographs")
    folder = HERE / "photo_clip" / "photo"
    if not folder.is_dir():
        raise SystemExit(f"{folder} is missing: make it with photo_clip/train.py and export.py")
    pictures = linked(
        work / "calibration", listed(data / "msrc" / "images", data / "msrc" / "train.txt")
    )
    return {
        "model": os.path.relpath(folder),
        # Relative: they stand in the record and on the page.
        "data": os.path.relpath(data / "msrc"),
        "list_file": os.path.relpath(data / "msrc" / "test.txt"),
        "text_embeddings": os.path.relpath(next((data / "text").glob("*.npz"))),
        "calibration": os.path.relpath(pictures),
    }


def listed(folder: Path, stems: Path | None) -> list[Path]:
    """The pictures of a folder, or those that a list names."""
    if stems is None:
        return sorted(folder.iterdir())
    return [next(folder.glob(f"{stem}.*")) for stem in stems.read_text().split()]


def linked(folder: Path, pictures: Iterable[Path]) -> Path:
    """A folder of links to pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for source in pictures:
        link = folder / source.name
        if not link.exists():
            link.symlink_to(source.resolve())
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("testbed", choices=("tiny", "photo"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, help="default: runs/quality-<testbed>")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--table", action="append", help="30-50 or 70-85; default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="make every row anew")
    chosen = parser.parse_args(arguments)
    work = chosen.work or Path("runs") / f"quality-{chosen.testbed}"
    for name in chosen.table or TABLES[chosen.testbed]:
        if name not in TABLES[chosen.testbed]:
            parser.error(f"{chosen.testbed} has the tables {', '.join(TABLES[chosen.testbed])}")
        ratios, methods = TABLES[chosen.testbed][name]
        page = HERE / "quality" / f"{chosen.testbed}-{name}"
        before = page / "compare.json"
        ovsprune.compare(
            **testbed(chosen.testbed, chosen.data, work),
            ratios=ratios,
            methods=methods,
            seeds=chosen.seeds,
            samples=chosen.samples,
            threads=chosen.threads,
            output=os.path.relpath(work / "rows"),
            earlier=[before] if before.is_file() and not chosen.fresh else [],
        )
        page.mkdir(parents=True, exist_ok=True)
        for file in ("compare.json", "README.md", "curves.png"):
            shutil.copyfile(work / "rows" / file, page / file)
        print(page / "README.md")


if __name__ == "__main__":
    main()
