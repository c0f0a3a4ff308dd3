"""What pruning does to the features of EfficientNet-Lite0 on photographs, by method.

    python benchmarks/lite0/export.py --folder runs/lite0
    python benchmarks/lite0/measure.py --data DATA

No text embeddings fit this network, so nothing but the features is compared: on the pictures of
MSRC's test list, which calibration never sees. Calibration pictures are drawn by the seed from
MSRC's train list and COCO128. Every row is kept in ``--work`` as it is done: run again, it goes on
where it stopped. At the end ``benchmarks/quality/lite0/`` gets the record and the page.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ovsprune.backbones import load_backbone
from ovsprune.calibration.fidelity import Agreement
from ovsprune.calibration.pictures import FilePictures
from ovsprune.comparison.methods import parse_methods
from ovsprune.comparison.results import Rows
from ovsprune.comparison.runner import ComparisonRunner
from ovsprune.core.files import write_text
from ovsprune.core.progress import Progress, Silent
from ovsprune.core.protocols import Backbone
from ovsprune.graph.costs import count_costs
from ovsprune.profiling.timing import thread_limit
from ovsprune.pruning.config import PruneConfig
from ovsprune.report.intervals import pooled_difference, spread
from ovsprune.report.numbers import count, duration

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from sizes import spread_over  # noqa: E402

METHODS = (
    "default",
    "magnitude+closed-form",
    "random+closed-form",
    "magnitude",
    "random",
)
RATIOS = (0.3, 0.5, 0.7)
COLUMNS = ("status", "reason", "macs", "params", "achieved", "relative_error", "pooled_error",
           "cosine", "seconds")  # fmt: skip
FIGURES = {"relative_error": "error, dense", "pooled_error": "error, pooled", "cosine": "cosine"}


class FeatureExaminer:
    """Compares a tower's dense and pooled outputs with the dense tower's, picture by picture.

    Args:
        backbone: The dense model; its outputs are computed once and kept.
        pictures: The test pictures.
        batch_size: Pictures at a time.
    """

    def __init__(self, backbone: Backbone, pictures: FilePictures, batch_size: int) -> None:
        self._backbone, self._pictures, self._batch_size = backbone, pictures, batch_size
        self._wanted = list(self._outputs(backbone.tower))

    def score(self, tower: nn.Module, label: str) -> dict[str, float]:
        """Figures of a tower: :data:`FIGURES`."""
        dense, pooled = Agreement(), Agreement()
        for wanted, found in zip(self._wanted, self._outputs(tower.eval()), strict=True):
            pooled.update(wanted[0][:, :, None, None], found[0][:, :, None, None])
            dense.update(wanted[1], found[1])
        return {
            "relative_error": dense.result().relative_error,
            "pooled_error": pooled.result().relative_error,
            "cosine": dense.result().cosine,
        }

    @torch.no_grad()
    def _outputs(self, tower: nn.Module) -> Any:
        stages = self._backbone.stages(tower)
        for images in self._pictures.batches(self._batch_size):
            yield stages.outputs(images)


class Notes(Silent):
    """Says the notes, and one line a stage of the work."""

    def note(self, message: str) -> None:
        print(message, flush=True)


def photographs(data: Path, work: Path) -> tuple[Path, list[Path]]:
    """A folder of links to the calibration pictures, and the test pictures."""
    images = {path.stem: path for path in sorted((data / "msrc" / "images").iterdir())}
    train, test = (
        [images[stem] for stem in (data / "msrc" / f"{part}.txt").read_text().split()]
        for part in ("train", "test")
    )
    folder = work / "calibration"
    folder.mkdir(parents=True, exist_ok=True)
    for source in [*train, *sorted((data / "coco128" / "images").iterdir())]:
        link = folder / source.name
        if not link.exists():
            link.symlink_to(source.resolve())
    return folder, test


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each ratio and method: means and deviations over the seeds."""
    found = []
    for ratio, method in dict.fromkeys((row["ratio"], row["method"]) for row in rows):
        mine = [r for r in rows if (r["ratio"], r["method"]) == (ratio, method)]
        entry: dict[str, Any] = {"ratio": ratio, "method": method, "seeds": len(mine)}
        for figure in (*FIGURES, "macs", "seconds"):
            values = [row[figure] for row in mine if row[figure] is not None]
            if values:
                over = spread(values)
                entry[figure] = {"mean": over.mean, "sd": over.sd}
        found.append(entry)
    return found


def page(record: dict[str, Any]) -> str:
    """The tables in Markdown."""
    dense = record["dense"]
    lines = [
        "# EfficientNet-Lite0: features after pruning",
        "",
        f"Dense: {count(dense['macs'])} MACs, {count(dense['params'])} parameters, public ImageNet "
        f"weights, {record['images']} photographs of MSRC's test list. {record['samples']} "
        "calibration images of MSRC's train list and COCO128, "
        f"{spread_over(record['seeds'])}.",
        "",
        "error: norm of the difference divided by the norm of the dense tower's centred outputs; "
        "0 is equal, 1 is as bad as predicting the mean everywhere. dense: features of the last "
        "layer at each position; pooled: their mean over an image. No method uses gradient steps. "
        "There is no mIoU, because no text embeddings match this network.",
        "",
    ]
    for ratio in record["ratios"]:
        entries = [e for e in record["summary"] if e["ratio"] == ratio]
        entries.sort(key=lambda e: e["relative_error"]["mean"] if "relative_error" in e else 9e9)
        lines += [
            f"## {100 * ratio:.0f}% of the MACs removed",
            "",
            f"| method | MACs | {' | '.join(FIGURES.values())} | time |",
            "| --- | " + "---: | " * (len(FIGURES) + 2),
        ]
        for entry in entries:
            if "relative_error" not in entry:
                lines.append(f"| {entry['method']} | not reached |" + " |" * (len(FIGURES) + 1))
                continue
            figures = [
                f"{entry[f]['mean']:.3f}"
                + ("" if entry[f]["sd"] is None else f" ± {entry[f]['sd']:.3f}")
                for f in FIGURES
            ]
            cells = [entry["method"], count(round(entry["macs"]["mean"])), *figures]
            lines.append(f"| {' | '.join(cells)} | {duration(entry['seconds']['mean'])} |")
        lines.append("")
        gaps = _gaps(record["rows"], ratio)
        if gaps:
            lines.append(
                f"Dense error of `default` minus that of another method, 95% intervals: {gaps}."
            )
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _gaps(rows: Sequence[dict[str, Any]], ratio: float) -> str:
    def errors(method: str) -> list[float]:
        return [
            row["relative_error"]
            for row in rows
            if (row["ratio"], row["method"]) == (ratio, method) and row["status"] == "done"
        ]

    others = dict.fromkeys(row["method"] for row in rows if row["method"] != "default")
    gaps = {m: pooled_difference(errors("default"), errors(m)) for m in others
            if errors(m) and errors("default")}  # fmt: skip
    return ", ".join(
        f"{method} {gap.mean:+.3f}" + ("" if gap.half is None else f" ± {gap.half:.3f}")
        for method, gap in gaps.items()
    )


def compare(chosen: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Every row that is missing, and the record of all."""
    folder, test = photographs(chosen.data, chosen.work)
    backbone = load_backbone(str(chosen.model))
    settings = PruneConfig(ratio=0.5, calibration=str(folder), samples=chosen.samples)
    identity = {"model": backbone.name, "samples": chosen.samples, "images": len(test)}
    rows = Rows(chosen.work / "rows", identity)
    methods = parse_methods(chosen.methods or METHODS)
    ratios = chosen.ratio or RATIOS
    examiner = FeatureExaminer(backbone, FilePictures(test, backbone.preprocess), 16)
    contest = ComparisonRunner(backbone, settings, examiner, progress)  # type: ignore[arg-type]
    wanted = []
    for seed, ratio, method in itertools.product(range(chosen.seeds), ratios, methods):
        key = {"method": method.name, "ratio": ratio, "seed": seed}
        row = rows.find(key)
        if row is None:
            found = contest.row(method, ratio, seed)
            row = {**key, **{name: found.get(name) for name in COLUMNS}}
            rows.add(row)
            print(json.dumps(row), flush=True)
        wanted.append(row)
    wanted.sort(key=lambda row: (row["ratio"], row["seed"]))
    costs = count_costs(backbone.tower, backbone.preprocess.size)
    return {
        "model": backbone.name,
        **identity,
        "seeds": chosen.seeds,
        "ratios": list(ratios),
        "dense": {"macs": costs.macs, "params": costs.params},
        "rows": wanted,
        "summary": summary(wanted),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measures EfficientNet-Lite0, pruned")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=Path("runs/lite0"))
    parser.add_argument("--work", type=Path, default=Path("runs/quality-lite0"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--ratio", type=float, action="append")
    parser.add_argument("--methods", action="append")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args(arguments)
    with thread_limit(chosen.threads):
        record = compare(chosen, Notes())
    place = chosen.work / "rows"
    write_text(place / "compare.json", json.dumps(record, indent=2) + "\n")
    write_text(place / "README.md", page(record))
    target = HERE.parent / "quality" / "lite0"
    target.mkdir(parents=True, exist_ok=True)
    for file in ("compare.json", "README.md"):
        shutil.copyfile(place / file, target / file)
    print(target / "README.md")


if __name__ == "__main__":
    main()
