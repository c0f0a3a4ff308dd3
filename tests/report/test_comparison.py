from __future__ import annotations

import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from ovsprune.report.comparison import compare_summary, differences, page, summary
from ovsprune.report.curves import draw, spread_out

METHODS = ("default", "random+closed-form", "torch-pruning", *(f"method-{i}" for i in range(8)))


@pytest.fixture
def record():
    rows = []
    for ratio in (0.3, 0.7):
        for place, method in enumerate(METHODS):
            for seed in range(3):
                far = method == "torch-pruning" and ratio > 0.5
                kept = 1 - ratio * (0.1 + 0.05 * place) + 0.01 * seed
                rows.append(
                    {
                        "method": method,
                        "ratio": ratio,
                        "seed": seed,
                        "status": "unreachable" if far else "done",
                        "reason": "took at most 0.441" if far else None,
                        "macs": None if far else round(1e8 * (1 - ratio)),
                        "params": None if far else round(6e5 * (1 - ratio)),
                        "miou": None if far else 0.8 * kept,
                        "pixel_accuracy": None if far else 0.9,
                        "retention": None if far else kept,
                        "relative_error": None if far else 0.05 + 0.1 * place * ratio,
                        "seconds": None if far else 2.0,
                    }
                )
    made = {
        "model": "tiny", "trained": True, "data": "scenes", "images": 500, "samples": 256,
        "calibration": "procedural", "centred": False, "budget": "macs", "protect": [],
        "round_to": 1, "seeds": 3, "ratios": [0.3, 0.7], "methods": list(METHODS),
        "dense": {"macs": 100_000_000, "params": 600_000, "miou": 0.8}, "rows": rows,
        "plot": "out/curves.png", "output": "out", "seconds": 3.0,
    }  # fmt: skip
    made["summary"] = summary(made)
    made["differences"] = differences(made, "default")
    return made


def shown(parts) -> str:
    console = Console(file=io.StringIO(), width=120)
    for part in parts:
        console.print(part)
    return console.file.getvalue()


def test_summary_is_means_over_seeds(record):
    entry = next(e for e in record["summary"] if (e["method"], e["ratio"]) == ("default", 0.7))
    assert entry["seeds"] == 3 and entry["macs"] == 30_000_000
    assert entry["retention"]["mean"] == pytest.approx(0.94)
    assert entry["retention"]["sd"] == pytest.approx(0.01)
    assert entry["retention"]["half"] == pytest.approx(4.302653 * 0.01 / 3**0.5, rel=1e-5)


def test_differences_omit_methods_without_rows(record):
    pairs = [(gap["method"], gap["ratio"]) for gap in record["differences"]]
    assert ("torch-pruning", 0.3) in pairs and ("torch-pruning", 0.7) not in pairs
    assert not any(method == "default" for method, _ in pairs)
    gap = record["differences"][0]
    assert gap["method"] == "random+closed-form"
    assert gap["retention"]["mean"] == pytest.approx(0.3 * 0.05)


def test_tables_are_grouped_by_ratio_best_first(record):
    text = shown(compare_summary(record))
    first, second = text.index("30% of the MACs removed"), text.index("70% of the MACs removed")
    part = text[second:]
    assert first < second
    assert part.index("default") < part.index("random+closed-form") < part.index("method-7")
    assert part.index("method-7") < part.index("not reached")
    assert "94.0% ± 1.0" in part
    assert "torch-pruning at 0.7: took at most 0.441" in part
    assert "default minus the other methods" in part


def test_page(record):
    text = page(record)
    assert "# tiny: methods compared" in text and "![Quality against MACs](curves.png)" in text
    assert "| default | 3 | 30.0 M | 94.0% ± 1.0 |" in text
    assert "- `torch-pruning at 0.7`: took at most 0.441" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in tables if "**" not in line}) == 2
    assert "weights are random" not in text
    assert "weights are random" in page({**record, "trained": False})


def test_page_names_the_versions_that_made_the_rows(record):
    rows = record["rows"]
    assert f"Made by an unknown version ({len(rows)} rows)." in page(record)
    made = [{**row, "made_by": "ovsprune 2" if i else "ovsprune 1"} for i, row in enumerate(rows)]
    text = page({**record, "rows": made})
    assert text.endswith(f"Made by ovsprune 2 ({len(rows) - 1} rows); ovsprune 1 (1 row).\n")


def test_one_seed_has_no_spread(record):
    alone = {**record, "seeds": 1, "rows": [r for r in record["rows"] if r["seed"] == 0]}
    alone["summary"] = summary(alone)
    alone["differences"] = differences(alone, "default")
    text = page(alone)
    assert "93.0% | 74.4%" in text and "1 seed;" in text
    assert all(gap["retention"]["half"] is None for gap in alone["differences"])
    assert not any(gap["retention"]["clear"] for gap in alone["differences"])


def test_plot_has_a_colour_per_method(record, tmp_path):
    pytest.importorskip("matplotlib")
    draw(record, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert min(pixels.shape[:2]) > 800
    coloured = (pixels.max(2) - pixels.min(2) > 60).mean()
    assert 0.002 < coloured < 0.5
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):
        assert (np.abs(pixels - colour).sum(2) < 12).sum() > 200


def test_plot_is_the_same_for_the_same_record(record, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("a.png", "b.png"):
        draw(record, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_plot_of_unreached_budgets_is_empty(record, tmp_path):
    pytest.importorskip("matplotlib")
    only = {**record, "ratios": [0.7], "methods": ["torch-pruning"]}
    only["rows"] = [
        r for r in record["rows"] if r["method"] == "torch-pruning" and r["ratio"] > 0.5
    ]
    only["summary"] = summary(only)
    draw(only, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "wanted", [[0.5] * 5, [0.0, 0.01, 0.02], [1.0, 0.99, 0.5, 0.51], [0.3, 0.9, 0.1]]
)
def test_labels_do_not_overlap_and_keep_their_order(wanted):
    gap = 0.1
    places = spread_out(wanted, gap, 0.0, 1.0)
    ranked = sorted(places)
    assert all(b - a >= gap - 1e-6 for a, b in itertools.pairwise(ranked))
    assert ranked[0] >= -1e-6 and ranked[-1] <= 1 + 1e-6
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    assert [places[i] for i in order] == ranked
    assert places[0] == wanted[0] or min(abs(wanted[0] - w) for w in wanted[1:]) < gap


def test_asterisks_in_method_names_are_escaped(record):
    text = json.dumps(record).replace('"method-1"', '"random:floor=*.a=2:floor=*.b=3"')
    assert "| random:floor=\\*.a=2:floor=\\*.b=3 |" in page(json.loads(text))
