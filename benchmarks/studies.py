"""What the default's parts bring, and what calibration pictures it wants: the smaller tables.

    python benchmarks/studies.py tiny
    python benchmarks/studies.py photo --data DATA
    python benchmarks/studies.py photo --data DATA --study ablation --seeds 3

Rows are kept in ``--work`` as they are done: run again, it goes on where it stopped. Every study
gets ``benchmarks/quality/<testbed>-<study>/`` with the record, the page and the plot; rows that are
in that record already (of fewer seeds or methods, made on another machine) are not made again,
unless by ``--fresh``, which is wanted once the methods themselves have changed. Nor are those that
quality.py has made of the same pictures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sizes
from quality import HERE, TABLES, linked, listed, testbed

import ovsprune


@dataclass(frozen=True)
class Study:
    """One table.

    Attributes:
        methods: What is compared.
        ratios: At which ratios.
        pictures: Where photographs to calibrate ``photo`` are: folders of DATA, and the list of
            DATA that says which of them, if any; or what else ``--calibration`` takes. None for the
            testbed's own.
        samples: How many pictures; several make a curve.
        testbeds: Where it is of use.
    """

    methods: tuple[str, ...]
    ratios: tuple[float, ...] = (0.5, 0.7)
    pictures: Mapping[str, str | None] | str | None = None
    samples: tuple[int, ...] = (256,)
    testbeds: tuple[str, ...] = ("tiny", "photo")


def _ablation() -> tuple[str, ...]:
    """Criterion x allocation x recovery."""
    parts = itertools.product(
        ("reconstruction", "magnitude", "random"),
        ("sensitivity", "uniform"),
        ("gauss-newton", "closed-form", "none"),
    )
    return tuple("+".join(names) for names in parts)


EVERY_TRAINING_PICTURE = {
    "msrc/images": "msrc/train.txt",
    "coco128/images": None,
    "camvid/train/images": None,
}
STUDIES = {
    "ablation": Study(_ablation(), ratios=(0.7,)),
    "distill": Study(
        (
            "default+distill",
            "random+distill",
            "default",
            "random+gauss-newton",
            "random+closed-form",
            "random",
        )
    ),
    "imp": Study(("default", "imp", "random+gauss-newton", "random+closed-form", "random")),
    "procedural": Study(
        ("default", "random+closed-form", "random"), pictures="procedural", testbeds=("photo",)
    ),
    "leaves": Study(
        ("default", "random+closed-form", "random"), pictures="leaves", testbeds=("photo",)
    ),
    "mixed": Study(
        ("default", "random+closed-form", "random"),
        pictures="mixed",
        samples=(256, 1024),
        testbeds=("photo",),
    ),
    "domain": Study(
        ("default", "random+closed-form", "random"),
        pictures={"camvid/train/images": None},
        testbeds=("photo",),
    ),
    "options": Study(
        (
            "default",
            "default:prune-depth",
            "default:rounds=3",
            "random+closed-form",
            "random",
        )
    ),
    "deep": Study(
        (
            "default:prune-depth",
            "random+gauss-newton:prune-depth",
            "random+closed-form:prune-depth",
            "random:prune-depth",
            "default",
            "torch-pruning+gauss-newton",
        ),
        ratios=(0.85,),
        testbeds=("photo",),
    ),
    "samples": Study(
        ("default", "reconstruction+sensitivity+closed-form", "random+closed-form"),
        ratios=(0.7,),
        pictures=EVERY_TRAINING_PICTURE,
        samples=(16, 32, 64, 128, 256, 512),
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("testbed", choices=("tiny", "photo"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--study", action="append", choices=STUDIES)
    parser.add_argument("--methods", type=lambda text: text.split(","), help="default: all")
    parser.add_argument("--work", type=Path, help="default: runs/studies-<testbed>")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="make every row anew")
    chosen = parser.parse_args(arguments)
    work = chosen.work or Path("runs") / f"studies-{chosen.testbed}"
    for name in chosen.study or STUDIES:
        study = STUDIES[name]
        if chosen.testbed not in study.testbeds:
            print(f"{name} is not of use for {chosen.testbed}")
            continue
        place = HERE / "quality" / f"{chosen.testbed}-{name}"
        run(study, place, work / name, chosen)
        print(place / "README.md")


def run(study: Study, place: Path, work: Path, chosen: argparse.Namespace) -> None:
    """Fill a study's rows, and write its folder."""
    given = testbed(chosen.testbed, chosen.data, work) | calibration(study, work, chosen)
    records = {}
    many = len(study.samples) > 1
    done = place / ("samples.json" if many else "compare.json")
    there = done.is_file() and not chosen.fresh
    before = json.loads(done.read_text("utf-8")) if there else None
    for samples in study.samples:
        rows = work / f"rows-{samples}"
        known = sizes.part(before, samples) if many and before else before
        records[samples] = ovsprune.compare(
            **given,
            ratios=study.ratios,
            methods=chosen.methods or study.methods,
            seeds=chosen.seeds,
            samples=samples,
            threads=chosen.threads,
            output=os.path.relpath(rows),
            earlier=[
                *([known] if known else []),
                *(tables(study, samples, chosen.testbed) if not chosen.fresh else []),
            ],
        )
    place.mkdir(parents=True, exist_ok=True)
    if many:
        sizes.write(records, place)
        return
    for file in ("compare.json", "README.md", "curves.png"):
        shutil.copyfile(rows / file, place / file)


def tables(study: Study, samples: int, name: str) -> list[Path]:
    """Records of quality.py, if their rows are of the study's own pictures."""
    if samples != 256 or (study.pictures is not None and name != "tiny"):
        return []
    records = [HERE / "quality" / f"{name}-{table}" / "compare.json" for table in TABLES[name]]
    return [record for record in records if record.is_file()]


def calibration(study: Study, work: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """What a study calibrates with, if it is not what the testbed does."""
    if study.pictures is None or chosen.testbed == "tiny":
        return {}
    if isinstance(study.pictures, str):
        return {"calibration": study.pictures}
    found = [
        picture
        for folder, stems in study.pictures.items()
        for picture in listed(chosen.data / folder, chosen.data / stems if stems else None)
    ]
    return {"calibration": os.path.relpath(linked(work / "pictures", found))}


if __name__ == "__main__":
    main()
