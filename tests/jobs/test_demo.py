"""Demo on a smaller model than the embedded one."""

from __future__ import annotations

import json

import pytest
from PIL import Image

import ovsprune
from ovsprune import backbones
from ovsprune.core.errors import OptionError, OutputError
from ovsprune.core.progress import Silent
from ovsprune.jobs import demo as module
from ovsprune.jobs import small_san
from ovsprune.jobs.demo import demo

QUICK = {"samples": 8, "batch_size": 8, "probe": 4}


class Recording(Silent):
    """Progress reporter that records the descriptions of its stages."""

    def __init__(self):
        super().__init__()
        self.stages = []

    def stage(self, description, total):
        self.stages.append(description)
        return super().stage(description, total)


@pytest.fixture(autouse=True)
def quick(small_clip, monkeypatch):
    """Replace tiny by the small CLIP, with few images and no framework."""
    load = backbones.load_backbone
    monkeypatch.setattr(
        backbones,
        "load_backbone",
        lambda name, **rest: small_clip if name == "tiny" else load(name, **rest),
    )
    methods = {name: {**options, **QUICK} for name, options in module.METHODS.items()}
    monkeypatch.setattr(module, "METHODS", methods)
    monkeypatch.setattr(
        small_san, "transfer_into_small_san", lambda *_: {"skipped": "mmseg is not installed"}
    )


def test_demo_runs_twice_in_the_same_directory(tmp_path):
    place, progress = tmp_path / "demo", Recording()
    record = demo(place, scenes=5, threads=1, progress=progress)
    rows = {row["method"]: row for row in record["rows"]}
    assert list(rows) == ["dense", "default", "random+closed-form", "magnitude", "random"]
    for method, row in rows.items():
        if method != "dense":
            assert row["macs"] / rows["dense"]["macs"] == pytest.approx(0.5, abs=0.01)
            assert row["file_size"] < rows["dense"]["file_size"]
        assert row["retention"] == pytest.approx(row["miou"] / rows["dense"]["miou"])
        assert set(row["latency"]) == set(row["speedup"]) == {"1", "8"}
    assert rows["random"]["macs"] == rows["random+closed-form"]["macs"]
    assert record["evaluate"]["images"] == 5
    assert record["evaluate"]["miou"] == rows["default"]["miou"]
    assert len(record["benchmark"]["rows"]) == 4
    assert record["transfer"] == {"skipped": "mmseg is not installed"}
    assert progress.stages[0] == "ovsprune demo"

    assert ovsprune.read(place / "slim").spec.slim.macs == rows["default"]["macs"]
    assert record["inspect"]["slim"]["macs"] == rows["default"]["macs"]
    assert json.loads((place / "record.json").read_text()) == record
    with Image.open(place / "picture.png") as picture:
        assert picture.width > 1000

    (place / "picture.png").write_bytes(b"old")
    again = demo(place, scenes=5, threads=1)
    assert again["rows"][1]["miou"] == rows["default"]["miou"]
    with Image.open(place / "picture.png") as picture:
        assert picture.width > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, r"--ratio 1 is outside \(0, 1\)"),
        ({"scenes": 1}, "--scenes 1 is too few; give 4 or more"),
        ({"threads": 0}, "--threads 0 is out of range"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_options_out_of_range_leave_nothing_behind(tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        demo(tmp_path / "demo", **options)
    assert list(tmp_path.iterdir()) == []


def test_foreign_slim_directory_is_not_replaced(tmp_path):
    other = tmp_path / "slim" / "ViT-B-16-r0.5"
    other.mkdir(parents=True)
    with pytest.raises(OutputError, match="slim exists and is no slim checkpoint"):
        demo(tmp_path)
    assert other.is_dir()


def test_output_that_is_a_file_is_refused(tmp_path):
    file = tmp_path / "demo"
    file.write_text("mine")
    with pytest.raises(OutputError, match="demo is a file; name a directory with -o"):
        demo(file)
    assert file.read_text() == "mine"


def test_output_that_cannot_be_created_is_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OutputError, match="cannot be created"):
        demo(file / "demo", scenes=4)
