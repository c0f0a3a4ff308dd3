"""Summaries of the jobs' records for the terminal; each function returns what is to be printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    "table",
    "transfer_summary",
]

Record = Mapping[str, Any]
Parts = Sequence[RenderableType]


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A plain table whose first column is left-aligned and whose others are right-aligned.

    Args:
        title: Printed above it; may be empty.
        columns: Headings. One that starts with ``"<"`` (not printed) aligns its column left.
        rows: Cells, as many a row as there are columns.
    """
    made = Table(
        title=Text(title) if title else None, title_justify="left", title_style="bold",
        box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    for index, column in enumerate(columns):
        left = index == 0 or column.startswith("<")
        made.add_column(
            Text(column.removeprefix("<")),
            justify="left" if left else "right",
            overflow="fold",
        )
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def costs_table(title: str, dense: Record, slim: Record) -> Table:
    """MACs and parameters before and after."""
    rows = [
        [label, count(dense[key]), count(slim[key]), change(dense[key], slim[key])]
        for key, label in (("macs", "MACs"), ("params", "parameters"))
    ]
    return table(title, ["", "dense", "slim", "change"], rows)


def prune_summary(record: Record) -> Parts:
    """What ``prune`` cut, how close the slim tower stays, and where it is."""
    parts: list[RenderableType] = [
        costs_table(f"{record['model']}: image tower", record["dense"], record["slim"])
    ]
    fidelity = record.get("fidelity") or {}
    lines = []
    given = record.get("given")
    if given:
        lines.append(
            f"{given['slim']} was slim before, with {count(given['macs'])} MACs: ratio, features "
            "and times below are against it, the table is against the dense base."
        )
    if fidelity:
        reference = "what was given" if given else "dense"
        lines.append(
            f"Dense features on held-out pictures, slim against {reference}: cosine "
            f"{fidelity['cosine']:.4f}, relative error {fidelity['relative_error']:.4f}."
        )
    lines.append(
        f"Asked to remove {percent(record['ratio'])} of the {record['budget']}, removed "
        f"{percent(record['achieved'], 2)}, in {duration(record['seconds'])}."
    )
    latency = record.get("latency")
    if latency:
        lines.append(
            f"One picture takes {duration(latency['slim_ms'] / 1e3)}, dense "
            f"{duration(latency['dense_ms'] / 1e3)}: {percent(latency['measured_ratio'])} less, "
            f"where the table of layer times said {percent(record['achieved'])}."
        )
    output = record.get("output")
    if output:
        lines += [f"Saved to {output}", "", _next_steps(str(output))]
    else:
        lines.append("Dry run: nothing was written.")
    return [*parts, Text("\n".join(lines))]


def _next_steps(output: str) -> str:
    return (
        "Next:\n"
        f"  ovsprune inspect {output}\n"
        f"  ovsprune benchmark --model {output}\n"
        f"  ovsprune transfer --slim {output} --target NAME"
    )


def transfer_summary(record: Record) -> Parts:
    """How many keys were replaced, kept and dropped, and the lines to add."""
    rows = [[part, str(_how_many(record.get(part)))] for part in ("replaced", "kept", "dropped")]
    title = f"{record['target']}: keys of the checkpoint"
    lines = [f"Slim tower: {record['slim']} (weights: {record['weights']})"]
    lines += [f"note: {note}" for note in record.get("notes", ())]
    if record.get("output"):
        lines.append(f"Saved to {record['output']}")
    else:
        lines.append("Dry run: nothing was written.")
    if record.get("lines"):
        added = record["lines"]
        text = added if isinstance(added, str) else "\n".join(added)
        lines += ["", "Add to the training script:", "", text]
    return [table(title, ["", "keys"], rows), Text("\n".join(lines))]


def launch_summary(record: Record) -> Parts:
    """Which models were made slim, and how the command ended."""
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
        f"Schedule {s['policy']}: {len(s['trainable'])} parameters trained at first, "
        f"{len(s['frozen'])} were frozen; {s['total_steps']:,} steps"
        for s in record["schedules"]
    ]
    lines.append(f"The command ended with status {record['returncode']}.")
    columns = ["model", "target", "replaced", "parameters", "now"]
    return [table("Replaced as they were built", columns, rows), Text("\n".join(lines))]


def _how_many(value: Any) -> int:
    if isinstance(value, int):
        return value
    return len(value) if value is not None else 0


def inspect_summary(record: Record) -> Parts:
    """What a slim checkpoint holds."""
    base = record["base"]
    head = [
        f"{base['model']}, weights {base['pretrained'] or 'none'}"
        + ("" if base["trained"] else " (UNTRAINED: predictions mean nothing)"),
        f"built by {record['family']} ({record['library']} {record['library_version']}), "
        f"activation {record['activation']}, "
        f"input {' x '.join(str(side) for side in record['preprocess']['size'])}",
        f"format {record['format']}, {file_size(record['bytes'])} in {len(record['files'])} files",
    ]
    rows = []
    for layer in record["layers"]:
        share = percent(layer["kept"] / layer["units"], 0)
        kind = layer["kind"]
        what = kind if kind == "heads" else f"{kind} units"
        mark = "protected" if layer["protected"] else ""
        rows.append([layer["name"], what, str(layer["kept"]), str(layer["units"]), share, mark])
    listed = {layer["name"] for layer in record["layers"]}
    whole = [name for name in record["protected"] if name not in listed]
    kept = [f"Kept whole: {', '.join(whole)}", ""] if whole else []
    made = [f"  {key}: {value}" for key, value in record["provenance"].items()]
    return [
        Text("\n".join(head)),
        costs_table("Image tower", record["dense"], record["slim"]),
        table("Layers", ["layer", "<units", "kept", "of", "share", "<"], rows),
        Text("\n".join([*kept, "How it was made", *made])),
    ]


def evaluate_summary(record: Record) -> Parts:
    """Scores of the classes, best first, and the means."""
    ranked = sorted(record["per_class"].items(), key=lambda item: -(item[1] or 0.0))
    rows = [[name, percent(value) if value is not None else "-"] for name, value in ranked]
    half = (len(rows) + 1) // 2
    blank = ["", ""]
    paired = [[*rows[i], *(rows[half + i] if half + i < len(rows) else blank)] for i in range(half)]
    summary = (
        f"mIoU {percent(record['miou'])}, pixel accuracy {percent(record['pixel_accuracy'])}, "
        f"{record['images']} pictures in {duration(record['seconds'])}"
    )
    return [
        table("IoU by class", ["class", "IoU", "<class", "IoU"], paired),
        Text(summary, style="bold"),
    ]


def benchmark_summary(record: Record) -> Parts:
    """Latency, throughput and peak memory, one row a tower and batch size."""
    rows = []
    for row in record["rows"]:
        memory = row["peak_memory"]
        rows.append(
            [
                row["name"],
                str(row["batch"]),
                duration(row["latency"]),
                f"{row['throughput']:.1f}/s",
                file_size(memory) if memory is not None else "n/a",
                count(row["macs"]),
                f"{row['speedup']:.2f}x" if row.get("speedup") else "",
            ]
        )
    columns = ["tower", "batch", "latency", "pictures", "peak memory", "MACs", "speed-up"]
    note = (
        f"Median of {record['pairs']} alternating pairs on {record['device']}, "
        f"{record['dtype']}, {record['threads']} threads; memory in a fresh process each."
    )
    return [table("", columns, rows), Text(note, style="dim")]


def export_summary(record: Record) -> Parts:
    """Where the exported file is, how far it is from the tower, and what it takes."""
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
        parts.insert(0, table("", ["runtime", "batch", "latency", "pictures", "speed-up"], rows))
    return parts


def listing(record: Record) -> Parts:
    """Lists of names with a line about each."""
    parts = []
    for kind, entries in record.items():
        rows = [[entry["name"], entry.get("summary", "")] for entry in entries]
        about = "<weights" if kind == "models" else "<what it is"
        parts.append(table(kind, ["name", about], rows))
    return parts


# What the methods of the demo are, in words.
METHODS = {
    "dense": "dense",
    "default": "default",
    "random+closed-form": "random + closed-form",
    "magnitude": "magnitude",
    "random": "random",
}


def demo_summary(record: Record) -> Parts:
    """The demo's table, and where its files are."""
    rows = []
    for row in record["rows"]:
        (small, large) = row["latency"]
        rows.append(
            [
                METHODS.get(row["method"], row["method"]),
                count(row["macs"]),
                count(row["params"]),
                file_size(row["file_size"]),
                f"{duration(row['latency'][small])} ({row['speedup'][small]:.2f}x)",
                f"{duration(row['latency'][large])} ({row['speedup'][large]:.2f}x)",
                percent(row["miou"]),
                percent(row["retention"]),
            ]
        )
    columns = ["", "MACs", "parameters", "file", f"latency, batch {small}"]
    columns += [f"latency, batch {large}", "mIoU", "kept"]
    title = f"{record['model']}, {percent(record['ratio'], 0)} of the MACs removed"
    slim = f"{record['output']}/slim"
    lines = [
        f"mIoU: zero-shot, on {record['scenes']} procedural test scenes; kept: its share of dense.",
        "file: the image tower. One seed: a point or two between methods says little.",
        "",
        f"slim checkpoint  {slim}",
        f"picture          {record['picture']}",
    ]
    transfer = record["transfer"]
    if "skipped" in transfer:
        lines += ["", f"Left out: the transfer into a small SAN. {transfer['skipped']}"]
    else:
        cosine, params = transfer["cosine"], transfer["params"]
        lines += [
            "",
            f"Put into a small SAN of mmsegmentation: {transfer['modules']} modules replaced, "
            f"{count(params['before'])} -> {count(params['after'])} parameters.",
            f"Slim against dense SAN (its side adapter is untrained): cosine of the masks "
            f"{cosine['masks']:.4f}, of the class logits {cosine['logits']:.4f}.",
        ]
    lines += ["", f"Done in {duration(record['seconds'])}. Next:"]
    lines += [f"  ovsprune inspect {slim}", f"  ovsprune benchmark --model {slim}"]
    return [table(title, columns, rows), Text("\n".join(lines))]
