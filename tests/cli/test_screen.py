"""Output to stdout, stderr and the record file."""

from __future__ import annotations

import json
import math
import os
import stat

import numpy as np
import pytest
from click.testing import CliRunner

from ovsprune.cli.main import main
from ovsprune.cli.screen import Screen
from ovsprune.core.errors import OutputError
from ovsprune.jobs import listing

LISTED = {"targets": [{"name": "some-framework", "summary": "Does things."}]}


@pytest.fixture
def run(monkeypatch):
    def targets():
        print("a library prints")
        return LISTED

    monkeypatch.setattr(listing, "targets", targets)

    def call(*args: str):
        return CliRunner().invoke(main, ["targets", *map(str, args)])

    return call


def test_tables_go_to_stdout(run):
    result = run()
    assert result.exit_code == 0
    assert "some-framework" in result.stdout
    assert result.stderr == ""


def test_json_dash_prints_only_the_record_on_stdout(run):
    result = run("--json", "-")
    assert json.loads(result.stdout) == LISTED
    assert "some-framework" in result.stderr
    assert "a library prints" in result.stderr


def test_quiet_json_dash_prints_only_the_record(run):
    result = run("--json", "-", "--quiet")
    assert json.loads(result.stdout) == LISTED
    assert "some-framework" not in result.stderr


def test_json_file(run, tmp_path):
    path = tmp_path / "record.json"
    path.write_text("old")
    result = run("--json", path)
    assert "some-framework" in result.stdout
    assert json.loads(path.read_text()) == LISTED
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]
    # As any new file, not as private as a temporary one.
    other = tmp_path / "other"
    other.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (".", "is a directory; give a file"),
        ("missing/record.json", "does not exist; create it first"),
    ],
)
def test_unwritable_json_is_refused_before_the_computation(
    run, tmp_path, monkeypatch, place, message
):
    def targets():
        raise AssertionError("the work was done")

    monkeypatch.setattr(listing, "targets", targets)
    result = run("--json", tmp_path / place)
    assert result.exit_code == 2
    assert message in result.stderr


def test_full_disk_keeps_the_old_record(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    path.write_text("old")
    screen = Screen(str(path), quiet=True)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"--json .*json could not be written: .*No space"):
        screen.finish({"a": 1})
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


def test_records_are_plain_json(tmp_path):
    path = tmp_path / "record.json"
    Screen(str(path), quiet=True).finish(
        {
            "nan": math.nan,
            "count": np.int64(3),
            "share": np.float32(0.5),
            "nested": ({"path": tmp_path},),
            "true": True,
        }
    )
    assert json.loads(path.read_text()) == {
        "nan": None,
        "count": 3,
        "share": 0.5,
        "nested": [{"path": str(tmp_path)}],
        "true": True,
    }
