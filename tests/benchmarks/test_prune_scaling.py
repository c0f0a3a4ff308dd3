"""Scripts that measure the cost of a prune: arithmetic, page, and continuation."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from tests.contracts.conftest import open_clip_vit

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in ("prune_cost", "prune_scaling"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module


def row(model: str, macs: float, seconds: float, solver: float) -> dict:
    stages = dict.fromkeys(("moments", "curves", "refit", "write"), seconds / 8)
    stages |= {"solver": solver, "rest": seconds - seconds / 2 - solver}
    return {
        "model": model, "macs": macs, "params": macs / 100, "samples": 16, "threads": 2,
        "seconds": seconds, "forward_pass_seconds": seconds / 50, "forward_passes": 50.0,
        "peak_gib": (macs / 1e9) ** 0.5, "stages": stages,
    }  # fmt: skip


def test_stages_add_up_and_the_solver_is_separate(script, tmp_path):
    found = script("prune_cost").cost(open_clip_vit(), 8, output=tmp_path / "slim")
    stages = found["stages"]
    assert sum(stages.values()) == pytest.approx(found["seconds"], abs=0.1)
    assert min(stages.values()) >= 0
    # 32 eliminations of up to 128 units and curves of five groups cannot take no time at all.
    assert stages["solver"] > 0 and stages["curves"] > 0 and stages["refit"] > 0
    assert found["peak_gib"] > 0.1 and found["macs"] > 0
    assert (tmp_path / "slim" / "config.json").is_file()


def test_image_towers_have_no_text_tower(script):
    found = script("prune_scaling").image_tower("ViT-S-32")
    assert not found.has_text and not found.text
    assert sum(p.numel() for p in found.tower.parameters()) == 22_641_792
    with pytest.raises(SystemExit, match="no model ViT-Q-1"):
        script("prune_scaling").image_tower("ViT-Q-1")


def test_slopes_of_power_laws(script):
    scaling = script("prune_scaling")
    rows = [
        row(str(n), n, 10 * n**1.1 + n**1.5 / 100, n**1.5 / 100) for n in (1e9, 4e9, 16e9, 1e11)
    ]
    found = scaling.slopes(rows)
    assert found["without_solver"] == pytest.approx(1.1, abs=1e-3)
    assert found["solver"] == pytest.approx(1.5, abs=1e-3)
    assert found["peak"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(("power", "said"), [(1.0, "inside the bounds"), (1.4, "OUTSIDE the")])
def test_the_page_reports_whether_the_bounds_hold(script, tmp_path, power, said):
    pytest.importorskip("matplotlib")
    rows = [row("large", 9e9, 9**power * 100, 1.0), row("small", 1e9, 100.0, 1.0)]
    script("prune_scaling").write(tmp_path, rows)
    page = (tmp_path / "README.md").read_text()
    assert said in page and page.index("| small") < page.index("| large")
    assert f"{power:.2f}** without the solver" in page
    assert (tmp_path / "scaling.png").stat().st_size > 1000


def test_an_interrupted_run_continues(script, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    scaling, made = script("prune_scaling"), []

    def measure(name, samples, threads):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(name)
        return row(name, 10.0 ** (9 + len(made)), 100.0 * len(made), 5.0)

    monkeypatch.setattr(scaling, "measure", measure)
    run = ["--place", str(tmp_path), *(f"--model={name}" for name in "abc")]
    with pytest.raises(KeyboardInterrupt):
        scaling.main(run)
    kept = json.loads((tmp_path / "scaling.json").read_text())
    assert [r["model"] for r in kept["rows"]] == ["a", "b"] and kept["slopes"]
    made[:] = ["-"]
    scaling.main(run)
    assert made == ["-", "c"]
    with pytest.raises(SystemExit, match="rows of other pictures or threads"):
        scaling.main([*run, "--samples", "8"])
