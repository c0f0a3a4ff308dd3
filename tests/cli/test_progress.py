"""Progress bars in a terminal, lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from ovsprune.cli import progress as module
from ovsprune.cli.progress import Bars


@pytest.fixture
def plain():
    return Console(file=io.StringIO(), force_terminal=False, width=100)


def test_only_long_stages_leave_a_line(plain, monkeypatch):
    bars = Bars(plain)
    with bars.stage("short", 2) as advance:
        advance(2)
    monkeypatch.setattr(module, "LONG", 0.0)
    with bars.stage("outer", 1), bars.stage("inner", 3) as advance:
        advance(3)
    lines = plain.file.getvalue().splitlines()
    assert [line.rpartition(":")[0] for line in lines] == ["  inner", "outer"]


def test_notes_are_printed_verbatim_and_kept(plain):
    bars = Bars(plain)
    with bars.stage("work", 1):
        bars.note("skipped a[red]b.png")
    assert "note: skipped a[red]b.png" in plain.file.getvalue()
    assert bars.notes == ["skipped a[red]b.png"]


def test_terminal_shows_a_bar():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    bars = Bars(console)
    with bars.stage("measuring [layers]", 4) as advance:
        advance(3)
        bars._bars.refresh()
        assert "measuring [layers]" in console.file.getvalue()
        assert "3/4" in console.file.getvalue()


def test_error_in_a_stage_closes_the_bars(plain):
    bars = Bars(plain)
    with pytest.raises(ValueError, match="inside"), bars.stage("outer", 1), bars.stage("in", 1):
        raise ValueError("inside")
    with bars.stage("again", 1) as advance:
        advance(1)
    assert bars._bars is None
