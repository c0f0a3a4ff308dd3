"""Smaller tables: their methods exist, and the curve over sizes shows the measurements."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from ovsprune.comparison.methods import parse_methods

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in ("quality", "sizes", "studies"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module


def test_methods_are_known_and_unique(script) -> None:
    for study in script("studies").STUDIES.values():
        assert len(parse_methods(study.methods)) == len(study.methods)
        assert all(0 < ratio < 1 for ratio in study.ratios)


def test_images_of_a_study_are_those_of_its_lists(script, tmp_path) -> None:
    studies = script("studies")
    images = tmp_path / "data" / "msrc" / "images"
    images.mkdir(parents=True)
    for stem in "abc":
        (images / f"{stem}.png").touch()
    (tmp_path / "data" / "msrc" / "train.txt").write_text("a\nc\n")
    study = studies.Study(("random",), pictures={"msrc/images": "msrc/train.txt"})
    chosen = studies.argparse.Namespace(testbed="photo", data=tmp_path / "data")
    given = studies.calibration(study, tmp_path / "work", chosen)
    assert sorted(p.name for p in Path(given["calibration"]).iterdir()) == ["a.png", "c.png"]
    for recipe in ("procedural", "leaves"):
        plain = studies.Study(("random",), pictures=recipe)
        assert studies.calibration(plain, tmp_path, chosen) == {"calibration": recipe}
    chosen.testbed = "tiny"
    assert studies.calibration(study, tmp_path, chosen) == {}


def test_sizes_share_one_page(script, tmp_path) -> None:
    def record(*kept: float) -> dict:
        rows = [
            {"method": "random", "ratio": 0.7, "seed": seed, "retention": value,
             "relative_error": 1 - value}
            for seed, value in enumerate(kept)
        ]  # fmt: skip
        return {
            "model": "m", "trained": True, "data": "scenes", "images": 3, "calibration": "c",
            "budget": "macs", "dense": {}, "methods": ["random"], "ratios": [0.7],
            "seeds": len(kept), "rows": rows, "centred": False, "protect": [], "round_to": 1,
        }  # fmt: skip

    records = {16: record(0.5, 0.7), 64: record(0.8, 0.9)}
    script("sizes").write(records, tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "| mIoU kept, % | 16 | 64 |" in page
    assert "| random | 60.0 ± 14.1 | 85.0 ± 7.1 |" in page
    assert "70% of the MACs removed" in page
    written = json.loads((tmp_path / "samples.json").read_text())
    assert [row["samples"] for row in written["rows"]] == [16, 16, 64, 64]
    part = script("sizes").part(written, 64)
    assert part.items() >= {**records[64], "samples": 64}.items()
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_rows_of_the_tables_are_reused_for_the_same_images_only(script) -> None:
    studies = script("studies")
    own, others = studies.STUDIES["distill"], studies.STUDIES["domain"]
    found = studies.tables(own, 256, "photo")
    assert [path.parent.name for path in found] == ["photo-30-50", "photo-70-85"]
    assert {json.loads(path.read_text())["samples"] for path in found} == {256}
    assert studies.tables(own, 64, "photo") == studies.tables(others, 256, "photo") == []
    assert len(studies.tables(studies.STUDIES["samples"], 256, "tiny")) == 2
