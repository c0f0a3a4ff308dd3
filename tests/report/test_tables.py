from __future__ import annotations

import io

from rich.console import Console

from ovsprune.report import tables

COSTS = {"dense": {"macs": 2_000_000, "params": 1000}, "slim": {"macs": 1_000_000, "params": 600}}


def shown(parts) -> str:
    console = Console(file=io.StringIO(), width=120)
    for part in parts:
        console.print(part)
    return console.file.getvalue()


def prune_record(**more):
    return {
        **COSTS,
        "model": "tiny",
        "ratio": 0.5,
        "budget": "macs",
        "achieved": 0.5012,
        "fidelity": {"cosine": 0.991, "relative_error": 0.12},
        "seconds": 12.0,
        "output": "slim/tiny-r0.5",
        **more,
    }


def test_prune_summary():
    text = shown(tables.prune_summary(prune_record()))
    assert "2.00 M" in text
    assert "-50.0%" in text
    assert "cosine 0.9910, relative error 0.1200" in text
    assert "Removed 50.12% of the macs (requested: 50.0%) in 12.0 s" in text
    assert "ovsprune inspect slim/tiny-r0.5" in text


def test_prune_summary_of_a_repruned_model_has_the_figures():
    given = {"slim": "slim/tiny-r0.3", "macs": 1_500_000, "params": 800}
    text = " ".join(shown(tables.prune_summary(prune_record(given=given))).split())
    assert "slim/tiny-r0.3 was pruned before, to 1.50 M MACs" in text
    assert "slim against the tower before: cosine 0.9910, relative error 0.1200." in text


def test_prune_summary_of_a_dry_run_names_no_output():
    text = shown(tables.prune_summary(prune_record(output=None, fidelity={})))
    assert "Dry run: nothing was written." in text
    assert "Saved" not in text
    assert "cosine" not in text


def test_prune_summary_shows_measured_and_predicted_latency():
    latency = {"dense_ms": 20.0, "slim_ms": 12.0, "predicted_ms": 9.9, "measured_ratio": 0.4}
    text = shown(tables.prune_summary(prune_record(budget="latency", latency=latency)))
    assert "takes 12.0 ms, dense 20.0 ms: 40.0% less; the table" in " ".join(text.split())


def test_brackets_in_names_are_no_markup():
    text = shown(tables.prune_summary(prune_record(output="out/[red]x[/red]")))
    assert "out/[red]x[/red]" in text


def test_evaluate_summary_shows_every_class_once_best_first():
    record = {
        "miou": 0.5,
        "pixel_accuracy": 0.75,
        "images": 3,
        "seconds": 2.0,
        "per_class": {"ball": 0.25, "star": 0.75, "tree": 0.5},
    }
    text = shown(tables.evaluate_summary(record))
    assert [text.count(name) for name in ("ball", "star", "tree")] == [1, 1, 1]
    assert text.index("star") < text.index("ball")
    assert "mIoU 50.0%, pixel accuracy 75.0%, 3 images in 2.0 s" in text


def test_benchmark_summary():
    row = {
        "name": "tiny slim", "role": "model", "batch": 8, "latency": 0.05, "throughput": 160.0,
        "peak_memory": 12_000_000, "macs": 1_000_000, "params": 600, "speedup": 1.9,
    }  # fmt: skip
    other = {**row, "name": "tiny dense", "peak_memory": None, "speedup": 1.0}
    record = {"rows": [other, row], "pairs": 20, "device": "cpu", "dtype": "float32", "threads": 2}
    text = shown(tables.benchmark_summary(record))
    assert "50.0 ms" in text
    assert "12.0 MB" in text
    assert "1.90x" in text
    assert "n/a" in text
    assert "Median of 20 alternating pairs on cpu, float32, 2 threads" in text


def test_inspect_summary_marks_untrained_and_protected():
    record = {
        **COSTS,
        "format": 1,
        "base": {"model": "tiny", "pretrained": None, "trained": False},
        "family": "clip-vit", "library": "open_clip_torch", "library_version": "3.3.0",
        "activation": "gelu", "preprocess": {"size": [112, 112]}, "bytes": 1234, "files": {"a": 1},
        "layers": [
            {"name": "b.0.attn", "kind": "heads", "units": 4, "kept": 1, "protected": False},
            {"name": "b.1.mlp", "kind": "mlp", "units": 8, "kept": 8, "protected": True},
        ],
        "protected": ["b.1.mlp", "b.1.attn"],
        "provenance": {"seed": 7},
    }  # fmt: skip
    text = shown(tables.inspect_summary(record))
    assert "UNTRAINED" in text
    assert "25%" in text
    assert "mlp units" in text
    assert text.count("protected") == 1
    assert "Not pruned: b.1.attn" in text
    assert "seed: 7" in text


def test_listing_shows_names_and_summaries():
    text = shown(tables.listing({"criteria": [{"name": "random", "summary": "Random order."}]}))
    assert "criteria" in text
    assert "random" in text
    assert "Random order." in text
