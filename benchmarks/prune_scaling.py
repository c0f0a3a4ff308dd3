"""How the cost of a prune grows with the tower: time by stage and peak memory, ViT-S to ViT-H.

    python benchmarks/prune_scaling.py [--model ViT-S-16 ...] [--samples 16] [--threads 2]

Image towers alone, with random weights: cost does not depend on them. Every tower is pruned in a
process of its own. A row is kept in ``benchmarks/cost/scaling.json`` as soon as it is done: run
again, it goes on where it stopped. At the end the page and the plot are drawn beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODELS = ("ViT-S-16", "ViT-B-16", "ViT-L-14", "ViT-H-14")
STAGES = ("moments", "curves", "refit", "solver", "write", "rest")
BOUNDS = (0.75, 1.25)
"""Of the log-log slope of time against MACs, the solver left out."""

Row = dict[str, Any]


def image_tower(name: str) -> Any:
    """An untrained model of open_clip's with next to nothing beside its image tower."""
    import open_clip

    from ovsprune.backbones import FAMILIES
    from ovsprune.core.records import DenseModel, Preprocess

    config = open_clip.get_model_config(name)
    if config is None:
        raise SystemExit(f"open_clip has no model {name}")
    config["text_cfg"] = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1,
                          "layers": 1}  # fmt: skip
    size = config["vision_cfg"]["image_size"]
    dense = DenseModel(name, config, Preprocess((size, size)))
    return FAMILIES.get("open_clip-vit").build(dense)


def without_solver(row: Mapping[str, Any]) -> float:
    """Seconds of everything but the O(n^3) solves."""
    return float(row["seconds"]) - float(row["stages"]["solver"])


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the straight line through (log x, log y), least squares."""
    u, v = [math.log(a) for a in x], [math.log(max(b, 1e-3)) for b in y]
    mean_u, mean_v = sum(u) / len(u), sum(v) / len(v)
    spread = sum((a - mean_u) ** 2 for a in u)
    return sum((a - mean_u) * (b - mean_v) for a, b in zip(u, v, strict=True)) / spread


def slopes(rows: Sequence[Row]) -> dict[str, float]:
    """Log-log slopes against MACs: of the time with and without the solver, stages, memory."""
    measures = {
        "without_solver": [without_solver(row) for row in rows],
        "total": [row["seconds"] for row in rows],
        **{name: [row["stages"][name] for row in rows] for name in STAGES},
        "forward_pass": [row["forward_pass_seconds"] for row in rows],
        "peak": [row["peak_gib"] for row in rows],
    }
    macs = [row["macs"] for row in rows]
    return {name: round(slope(macs, values), 3) for name, values in measures.items()}


def page(record: Mapping[str, Any]) -> str:
    """The record as a page in Markdown."""
    rows, found = record["rows"], record["slopes"]
    lines = [
        "# Cost of pruning by size of the tower",
        "",
        f"`{record['command']}`",
        "",
        f"Image towers of open_clip with random weights, pruned to half of their MACs with "
        f"{rows[0]['samples']} synthetic images by the default method, threads: "
        f"{rows[0]['threads']}, each in a separate process. Seconds by stage; the solver (column "
        "elimination and ridge solves, O(n³) in the units of a group) is a separate column. Peak: "
        "resident memory of the process, including torch and the dense tower.",
        "",
    ]
    heads = ["tower", "GMACs", "parameters", "seconds", "without solver", *STAGES, "forward passes",
             "peak, GiB"]  # fmt: skip
    lines += ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for row in rows:
        cells = [row["model"], f"{row['macs'] / 1e9:.1f}", f"{row['params'] / 1e6:.0f} M"]
        cells += [f"{row['seconds']:.0f}", f"{without_solver(row):.0f}"]
        cells += [f"{row['stages'][name]:.0f}" for name in STAGES]
        cells += [f"{row['forward_passes']:.0f}", f"{row['peak_gib']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    if found:
        inside = BOUNDS[0] <= found["without_solver"] <= BOUNDS[1]
        said = "inside" if inside else "OUTSIDE"
        lines += ["", "![Time and memory against MACs](scaling.png)", "", "## Growth", ""]
        lines += [
            f"Log-log slope against MACs (1 is proportional): **{found['without_solver']:.2f}** "
            f"without the solver, {said} the bounds {BOUNDS[0]} to {BOUNDS[1]}; "
            f"{found['total']:.2f} with it. By stage: "
            + ", ".join(f"{name} {found[name]:.2f}" for name in STAGES)
            + f". One forward pass of the dense tower: {found['forward_pass']:.2f}. "
            f"Peak memory: {found['peak']:.2f}.",
        ]
    return "\n".join([*lines, ""])


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Seconds by stage, and peak memory, against MACs, both axes logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    rows = record["rows"]
    macs = [row["macs"] / 1e9 for row in rows]
    figure = Figure(figsize=(9.5, 4.2), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    lines = {
        f"all but the solver (slope {record['slopes']['without_solver']:.2f})": (
            [without_solver(row) for row in rows], "#000000", "-", "o"),
        f"solver (slope {record['slopes']['solver']:.2f})": (
            [row["stages"]["solver"] for row in rows], "#D55E00", "--", "s"),
        "curves": ([row["stages"]["curves"] for row in rows], "#0072B2", ":", "^"),
        "refit": ([row["stages"]["refit"] for row in rows], "#009E73", ":", "v"),
        "moments": ([row["stages"]["moments"] for row in rows], "#CC79A7", ":", "D"),
    }  # fmt: skip
    for label, (values, colour, style, marker) in lines.items():
        left.plot(macs, values, label=label, color=colour, linestyle=style, marker=marker)
    left.set_ylabel("seconds")
    left.legend(fontsize=8, frameon=False)
    right.plot(macs, [row["peak_gib"] for row in rows], color="#000000", marker="o")
    right.set_ylabel("peak memory, GiB")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("GMACs of the dense tower")
        axes.grid(True, which="both", color="#DDDDDD", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    ticks = [gib for gib in (1, 2, 4, 8, 16, 32) if gib < 1.2 * rows[-1]["peak_gib"]]
    right.set_yticks(ticks, [f"{gib}" for gib in ticks])
    right.yaxis.set_minor_formatter(NullFormatter())
    for row in rows:
        last = row is rows[-1]
        right.annotate(row["model"], (row["macs"] / 1e9, row["peak_gib"]), fontsize=8,
                       xytext=(-8, -3) if last else (6, -10), ha="right" if last else "left",
                       textcoords="offset points")  # fmt: skip
    figure.savefig(path, format="png", metadata={"Software": None})


def measure(name: str, samples: int, threads: int) -> Row:
    """A row, by this script in a process of its own.

    Raises:
        SystemExit: The process failed; the rows before are kept.
    """
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            [sys.executable, __file__, "--row", str(Path(scratch, "slim")), "--model", name,
             "--samples", str(samples), "--threads", str(threads)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{name}: the process ended with {done.returncode}; earlier rows are kept")
    row: Row = json.loads(done.stdout)
    return row


def write(place: Path, rows: Sequence[Row]) -> None:
    """Record, page and plot of the rows that are there, smallest tower first."""
    ordered = sorted(rows, key=lambda row: row["macs"])
    record = {
        "command": "python benchmarks/prune_scaling.py",
        "slopes": slopes(ordered) if len(ordered) > 1 else {},
        "rows": ordered,
    }
    place.mkdir(parents=True, exist_ok=True)
    partial = place / ".scaling.json.part"
    partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, place / "scaling.json")
    (place / "README.md").write_text(page(record), encoding="utf-8")
    if record["slopes"]:
        draw(record, place / "scaling.png")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", action="append", help=f"default: {', '.join(MODELS)}")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--place", type=Path, default=HERE / "cost")
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    models = chosen.model or MODELS
    if chosen.row is not None:
        import torch
        from prune_cost import cost

        torch.set_num_threads(chosen.threads)
        row = cost(image_tower(models[0]), chosen.samples, output=chosen.row)
        print(json.dumps(row))
        return
    path = chosen.place / "scaling.json"
    rows = json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else []
    if any((r["samples"], r["threads"]) != (chosen.samples, chosen.threads) for r in rows):
        raise SystemExit(f"{path} has rows of other pictures or threads: name another --place")
    for name in models:
        if name not in {row["model"] for row in rows}:
            print(f"{name} ...", file=sys.stderr, flush=True)
            rows.append(measure(name, chosen.samples, chosen.threads))
            write(chosen.place, rows)
    if rows:
        write(chosen.place, rows)
        print(chosen.place / "README.md")


if __name__ == "__main__":
    main()
