"""Terminal summaries of records: each function returns renderables for the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ovsprune.report.numbers import change, count, duration, file_size, percent

__all__ = [
    "benchmark_summary",
    "costs_table",
    "demo_summary",
    "evaluate_summary",
    "export_summary",
    "inspect_summary",
    "launch_summary",
    "listing",
    "prune_summary",
    "saved_line",
    "table",
    "transfer_summary",
]

Record = Mapping[str, Any]
Parts = Sequence[RenderableType]


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Build a table with the first column left-aligned and the others right-aligned.

    Args:
        title: Title, may be empty.
        columns: Headings. A leading ``"<"`` (not printed) aligns the column left.
        rows: Cells, one per column.
    """
    result = Table(
        title=Text(title) if title else None, title_justify="left", title_style="bold",
        box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    for index, column in enumerate(columns):
        left = index == 0 or column.startswith("<")
        # fold: a long path goes on in the next line; rich would shorten it otherwise.
        result.add_column(
            Text(column.removeprefix("<")), justify="left" if left else "right", overflow="fold"
        )
    for row in rows:
        # Text, because rich reads brackets in a string as markup.
        result.add_row(*(Text(cell) for cell in row))
    return result


def costs_table(title: str, dense: Record, slim: Record) -> Table:
    """Build a table of MACs and parameters before and after."""
    rows = [
        [label, count(dense[key]), count(slim[key]), change(dense[key], slim[key])]
        for key, label in (("macs", "MACs"), ("params", "parameters"))
    ]
    return table(title, ["", "dense", "slim", "change"], rows)


def prune_summary(record: Record) -> Parts:
    """Summarise ``prune``: costs, agreement with the dense tower, output."""
    costs = costs_table(f"{record['model']}: image tower", record["dense"], record["slim"])
    fidelity = record.get("fidelity") or {}
    lines = []
    given = record.get("given")
    if given:
        lines.append(
            f"{given['slim']} was pruned before, to {count(given['macs'])} MACs. Ratio, features "
            "and times below are relative to it; the table is relative to the dense base."
        )
    if fidelity:
        reference = "the tower before" if given else "dense"
        lines.append(
            f"Dense features on held-out images, slim against {reference}: cosine "
            f"{fidelity['cosine']:.4f}, relative error {fidelity['relative_error']:.4f}."
        )
    lines.append(
        f"Removed {percent(record['achieved'], 2)} of the {record['budget']} (requested: "
        f"{percent(record['ratio'])}) in {duration(record['seconds'])}."
    )
    latency = record.get("latency")
    if latency:
        lines.append(
            # duration() takes seconds.
            f"One image takes {duration(latency['slim_ms'] / 1e3)}, dense "
            f"{duration(latency['dense_ms'] / 1e3)}: {percent(latency['measured_ratio'])} less; "
            f"the table of layer times predicted {percent(record['achieved'])}."
        )
    lines.append(saved_line(record))
    if output := record.get("output"):
        lines += [
            "",
            "Next:",
            f"  ovsprune inspect {output}",
            f"  ovsprune benchmark --model {output}",
            f"  ovsprune transfer --slim {output} --target NAME",
        ]
    return [costs, Text("\n".join(lines))]


def saved_line(record: Record) -> str:
    """Return a line that names the output, or reports a dry run."""
    output = record.get("output")
    return f"Saved to {output}" if output else "Dry run: nothing was written."


def transfer_summary(record: Record) -> Parts:
    """Summarise ``transfer``: numbers of replaced, kept and dropped keys, and lines to add."""
    rows = [[part, str(len(record[part]))] for part in ("replaced", "kept", "dropped")]
    title = f"{record['target']}: keys of the checkpoint"
    lines = [f"Slim tower: {record['slim']} (weights: {record['weights']})"]
    lines += [f"note: {note}" for note in record.get("notes", ())]
    lines.append(saved_line(record))
    if record["lines"]:
        lines += ["", "Add these lines to the training script:", "", record["lines"]]
    return [table(title, ["", "keys"], rows), Text("\n".join(lines))]


def launch_summary(record: Record) -> Parts:
    """Summarise ``launch``: replaced models, notes and exit status."""
    rows = [
        [
            str(model["model"]),
            str(model["target"]),
            str(len(model["replaced"])),
            count(model["params_before"]),
            count(model["params_after"]),
        ]
        for model in record["replaced"]
    ]
    lines = [f"Slim tower: {record['slim']}"]
    lines += [f"note: {event}" for event in record["events"]]
    lines += [
        f"Schedule {s['policy']}: {len(s['trainable'])} parameters trained at the start, "
        f"{len(s['frozen'])} frozen; {s['total_steps']:,} steps"
        for s in record["schedules"]
    ]
    lines.append(f"The command exited with status {record['returncode']}.")
    columns = ["model", "target", "replaced", "parameters", "slim"]
    return [table("Models replaced during construction", columns, rows), Text("\n".join(lines))]


def inspect_summary(record: Record) -> Parts:
    """Summarise ``inspect``: contents of a slim checkpoint."""
    base = record["base"]
    head = [
        f"{base['model']}, weights {base['pretrained'] or 'none'}"
        + ("" if base["trained"] else " (UNTRAINED: predictions are meaningless)"),
        f"built by {record['family']} ({record['library']} {record['library_version']}), "
        f"activation {record['activation']}, "
        f"input {' x '.join(str(side) for side in record['preprocess']['size'])}",
        f"format {record['format']}, {file_size(record['bytes'])} in {len(record['files'])} files",
    ]
    rows = [
        [
            layer["name"],
            layer["kind"] if layer["kind"] == "heads" else f"{layer['kind']} units",
            str(layer["kept"]),
            str(layer["units"]),
            percent(layer["kept"] / layer["units"], 0),
            "protected" if layer["protected"] else "",
        ]
        for layer in record["layers"]
    ]
    listed = {layer["name"] for layer in record["layers"]}
    unpruned = [name for name in record["protected"] if name not in listed]
    notes = [f"Not pruned: {', '.join(unpruned)}", ""] if unpruned else []
    provenance = [f"  {key}: {value}" for key, value in record["provenance"].items()]
    return [
        Text("\n".join(head)),
        costs_table("Image tower", record["dense"], record["slim"]),
        table("Layers", ["layer", "<units", "kept", "of", "share", "<"], rows),
        Text("\n".join([*notes, "Provenance", *provenance])),
    ]


def evaluate_summary(record: Record) -> Parts:
    """Summarise ``evaluate``: IoU of the classes, best first, and the means."""
    # The IoU of a class that does not occur is None; it counts as 0 in the order.
    ranked = sorted(record["per_class"].items(), key=lambda entry: -(entry[1] or 0.0))
    rows = [[name, "-" if value is None else percent(value)] for name, value in ranked]
    half = (len(rows) + 1) // 2
    # Two columns of classes: the better half on the left.
    pairs = zip_longest(rows[:half], rows[half:], fillvalue=["", ""])
    paired = [[*left, *right] for left, right in pairs]
    summary = (
        f"mIoU {percent(record['miou'])}, pixel accuracy {percent(record['pixel_accuracy'])}, "
        f"{record['images']} images in {duration(record['seconds'])}"
    )
    return [
        table("IoU by class", ["class", "IoU", "<class", "IoU"], paired),
        Text(summary, style="bold"),
    ]


def benchmark_summary(record: Record) -> Parts:
    """Summarise ``benchmark``: one row per tower and batch size."""
    rows = [
        [
            row["name"],
            str(row["batch"]),
            duration(row["latency"]),
            f"{row['throughput']:.1f}/s",
            "n/a" if row["peak_memory"] is None else file_size(row["peak_memory"]),
            count(row["macs"]),
            f"{row['speedup']:.2f}x",
        ]
        for row in record["rows"]
    ]
    columns = ["tower", "batch", "latency", "images", "peak memory", "MACs", "speed-up"]
    note = (
        f"Median of {record['pairs']} alternating pairs on {record['device']}, "
        f"{record['dtype']}, {record['threads']} threads; each memory measured in a new process."
    )
    return [table("", columns, rows), Text(note, style="dim")]


def export_summary(record: Record) -> Parts:
    """Summarise ``export``: file, errors against the tower, latency."""
    height, width = record["size"]
    sides = "any size" if record["dynamic"] else f"{height} x {width}"
    lines = [
        f"Saved to {record['output']} ({file_size(record['bytes'])}, opset {record['opset']}): "
        f"images [B, 3, H, W] of {sides} to pooled [B, C] and dense [B, C, h, w].",
        f"Largest error of {len(record['checks'])} checks: {record['max_error']:.2g}, "
        f"{record['relative_error']:.2g} standard deviations of the output.",
    ]
    rows = [
        [
            row["runtime"],
            str(row["batch"]),
            duration(row["latency"]),
            f"{row['throughput']:.1f}/s",
            f"{row['speedup']:.2f}x",
        ]
        for row in record["latency"]
    ]
    parts: list[RenderableType] = [Text("\n".join(lines))]
    if rows:
        parts.insert(0, table("", ["runtime", "batch", "latency", "images", "speed-up"], rows))
    return parts


def listing(record: Record) -> Parts:
    """Return one table of names and summaries per list."""
    return [
        table(
            kind,
            ["name", "<weights" if kind == "models" else "<summary"],
            [[entry["name"], entry["summary"]] for entry in entries],
        )
        for kind, entries in record.items()
    ]


def demo_summary(record: Record) -> Parts:
    """Summarise ``demo``: one row per method, files, and next commands."""
    batches = list(record["rows"][0]["latency"])
    rows = [
        [
            row["method"].replace("+", " + "),
            count(row["macs"]),
            count(row["params"]),
            file_size(row["file_size"]),
            *(f"{duration(row['latency'][b])} ({row['speedup'][b]:.2f}x)" for b in batches),
            percent(row["miou"]),
            percent(row["retention"]),
        ]
        for row in record["rows"]
    ]
    latencies = [f"latency, batch {batch}" for batch in batches]
    columns = ["", "MACs", "parameters", "file", *latencies, "mIoU", "kept"]
    title = f"{record['model']}, {percent(record['ratio'], 0)} of the MACs removed"
    slim = f"{record['output']}/slim"
    lines = [
        f"mIoU: zero-shot, on {record['scenes']} procedural scenes; kept: its fraction of dense.",
        "file: the image tower. One seed only: differences of 1 or 2 points are not significant.",
        "",
        f"slim checkpoint  {slim}",
        f"image            {record['picture']}",
    ]
    transfer = record["transfer"]
    if "skipped" in transfer:
        lines += ["", f"Skipped the transfer into a small SAN. {transfer['skipped']}"]
    else:
        cosine, params = transfer["cosine"], transfer["params"]
        lines += [
            "",
            f"Transferred into a small SAN of mmsegmentation: {transfer['modules']} modules "
            f"replaced, {count(params['before'])} -> {count(params['after'])} parameters.",
            f"Slim against dense SAN (its side adapter is untrained): cosine of the masks "
            f"{cosine['masks']:.4f}, of the class logits {cosine['logits']:.4f}.",
        ]
    lines += ["", f"Done in {duration(record['seconds'])}. Next:"]
    lines += [f"  ovsprune inspect {slim}", f"  ovsprune benchmark --model {slim}"]
    return [table(title, columns, rows), Text("\n".join(lines))]
