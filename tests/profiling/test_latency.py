"""Latency budgets from hand-made tables; no test asserts a measured time."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from ovsprune.backbones import FAMILIES
from ovsprune.core.errors import DataError, OptionError, OutputError
from ovsprune.core.progress import Silent
from ovsprune.core.protocols import Backbone, Budget
from ovsprune.graph.groups import find_groups
from ovsprune.jobs.prune import prune
from ovsprune.profiling import latency
from ovsprune.profiling.latency import LatencyModel, latency_budget
from ovsprune.profiling.latency_table import LatencyTable, cache_path, this_machine
from tests.contracts.conftest import open_clip_vit

SIZE = (48, 48)
QUICK: dict[str, Any] = {"samples": 4, "criterion": "magnitude", "recovery": "none"}


class Tower:
    """Rewritten small ViT with its prunable groups."""

    def __init__(self) -> None:
        backbone = open_clip_vit()
        self.family = FAMILIES.get(backbone.family)
        self.dense = deepcopy(backbone.tower).eval().requires_grad_(False)
        self.family.rewrite(self.dense)
        seeds = [seed for seed in self.family.prunable_layers(self.dense) if not seed.protected]
        self.groups = find_groups(self.dense, seeds, SIZE)

    def model(self) -> LatencyModel:
        return LatencyModel.of(self.dense, self.groups, self.family, torch.zeros(1, 3, *SIZE))

    def budget(self, file: Path | None, progress: Silent | None = None) -> Budget:
        return latency_budget(
            self.dense, self.groups, self.family, SIZE, 0.3, file, progress or Silent()
        )


@pytest.fixture(scope="module")
def tower() -> Tower:
    return Tower()


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Time one round only, and use a temporary cache directory."""
    monkeypatch.setattr(latency, "ROUNDS", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def here() -> dict[str, Any]:
    return this_machine(torch.device("cpu"), torch.float32, 1, SIZE)


def by_hand(model: LatencyModel, machine: Mapping[str, Any]) -> LatencyTable:
    """Table: 10 ms per block, of which 4 for heads and 5 for the MLP; 2 ms for stem and head."""
    times: dict[str, dict[int, float]] = {model.rest: {1: 2.0}}
    times |= {block: {1: 10.0} for block in model.blocks.values()}
    for piece, widths in model.groups.values():
        units, part = (4, 4.0) if piece.startswith("heads") else (128, 5.0)
        times[piece] = {w: 10.0 - part * (1 - w / units) for w in widths}
    return LatencyTable(machine, times)


@pytest.fixture
def table(tower: Tower, tmp_path: Path) -> Path:
    path = tmp_path / "table.json"
    by_hand(tower.model(), here()).write(path)
    return path


@pytest.fixture
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("layer times were measured")

    monkeypatch.setattr(latency, "_measured", refuse)


def test_prices_are_interpolated_from_the_table(
    tower: Tower, table: Path, no_measuring: None
) -> None:
    budget = tower.budget(table)
    assert (budget.kind, budget.dense) == ("latency", 32.0)  # 2 + 3 blocks of 10.
    assert budget.target == pytest.approx(0.7 * 32)
    for group in tower.groups:
        part = 4.0 if group.kind == "heads" else 5.0
        for fewer, more in ((1, 2), (2, group.units - 1), (group.units // 2, group.units)):
            price = budget.price(group, more) - budget.price(group, fewer)
            assert price == pytest.approx(part * (more - fewer) / group.units)


def test_narrower_block_that_is_slower_saves_nothing(tower: Tower) -> None:
    model = tower.model()
    table = by_hand(model, here())
    group = next(g for g in tower.groups if g.kind == "heads")
    piece, widths = model.groups[group.name]
    assert widths == (1, 2, 3)
    times = {**table.times, piece: {1: 7.0, 2: 12.0, 3: 11.0}}
    budget = model.budget(LatencyTable(here(), times), tower.groups, 0.3)
    saved = [budget.price(group, 4) - budget.price(group, w) for w in (1, 2, 3)]
    assert saved == [3.0, 0.0, 0.0]
    assert budget.dense == 32.0


def test_equal_blocks_share_their_pieces(tower: Tower) -> None:
    model = tower.model()
    assert len(set(model.blocks.values())) == 1
    assert len({piece for piece, _ in model.groups.values()}) == 2
    assert len(model.groups) == len(tower.groups) == 5


def test_second_run_reads_the_table_of_the_first(
    tower: Tower, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tower.budget(None)
    path = cache_path(here())
    found = LatencyTable.read(path)
    assert found.machine == here()
    assert {(p, w) for p, times in found.times.items() for w in times} == set(tower.model().passes)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    monkeypatch.setattr(latency, "_measured", None)
    assert tower.budget(None) == first


def test_only_missing_times_are_measured(tower: Tower, table: Path) -> None:
    whole = LatencyTable.read(table)
    piece, widths = next(iter(tower.model().groups.values()))
    rest = {k: dict(v) for k, v in whole.times.items()}
    del rest[piece][widths[0]]
    LatencyTable(whole.machine, rest).write(table)
    tower.budget(table)
    again = LatencyTable.read(table)
    assert again.times.keys() == whole.times.keys()
    changed = {(k, w) for k, v in again.times.items() for w in v if v[w] != whole.times[k].get(w)}
    assert changed == {(piece, widths[0])}


def test_other_number_of_threads_is_another_machine() -> None:
    one, two = here(), {**here(), "threads": 77}
    assert cache_path(one) != cache_path(two)
    assert here()["cpu"]


def test_table_of_another_machine_is_read_with_a_note(
    tower: Tower, tmp_path: Path, no_measuring: None
) -> None:
    path, progress = tmp_path / "phone.json", Silent()
    by_hand(tower.model(), {**here(), "cpu": "phone"}).write(path)
    assert tower.budget(path, progress).dense == 32.0
    assert any("measured on another machine: cpu 'phone'" in note for note in progress.notes)


def test_table_of_another_machine_is_never_extended(tower: Tower, tmp_path: Path) -> None:
    path = tmp_path / "phone.json"
    LatencyTable({**here(), "cpu": "phone"}).write(path)
    before = path.read_bytes()
    with pytest.raises(
        DataError, match=r"phone\.json has no time for .* measured on another machine"
    ):
        tower.budget(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "text",
    [
        "{", "[]", '{"format": 2, "machine": {}, "times": {}}', '{"format": 1, "machine": {}}',
        '{"format": 1, "machine": {}, "times": {"a": {"widths": [1, 2], "milliseconds": [1.0]}}}',
        '{"format": 1, "machine": {}, "times": {"a": {"widths": [1], "milliseconds": [-1.0]}}}',
        '{"format": 1, "machine": {}, "times": {"a": {"widths": [1], "milliseconds": [NaN]}}}',
        '{"format": 1, "machine": {}, "times": {"a": {"widths": [], "milliseconds": []}}}',
    ],
)  # fmt: skip
def test_malformed_table_is_refused(tower: Tower, tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"table\.json is no table of layer times .*delete it"):
        tower.budget(path)


def test_damaged_cache_is_measured_again(tower: Tower) -> None:
    path, progress = cache_path(here()), Silent()
    path.parent.mkdir(parents=True)
    path.write_text("{")
    tower.budget(None, progress)
    assert any("measured again" in note for note in progress.notes)
    assert LatencyTable.read(path).times


def test_table_that_cannot_be_written(
    tower: Tower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="could not be written: .*No space left.*--latency-table"):
        tower.budget(tmp_path / "table.json")
    assert not list(tmp_path.glob("*table*"))
    progress = Silent()
    tower.budget(None, progress)  # The cache is a help, not a need.
    assert any("could not be written" in note for note in progress.notes)


@pytest.fixture(scope="module")
def small() -> Backbone:
    return open_clip_vit()


@pytest.mark.parametrize("allocation", ["uniform", "global", "sensitivity"])
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_prune_to_a_latency_budget(
    small: Backbone, table: Path, no_measuring: None, allocation: str, ratio: float
) -> None:
    result = prune(
        small, ratio, budget="latency", latency_table=str(table), allocation=allocation, **QUICK
    )
    # By hand: 4 ms for 4 heads in two blocks (the last is protected), 5 ms for 128 units in three.
    left = (
        2
        + 3 * 10
        - sum(
            (4 - k.numel()) if n.endswith("attn") else 5 * (1 - k.numel() / 128)
            for n, k in result.plan.kept.items()
        )
    )
    assert result.achieved == pytest.approx(1 - left / 32)
    assert abs(result.achieved - ratio) <= 0.01
    found = result.record()["latency"]
    assert set(found) == {"dense_ms", "slim_ms", "predicted_ms", "measured_ratio"}
    assert found["predicted_ms"] == pytest.approx(left)
    assert found["dense_ms"] > 0 and found["slim_ms"] > 0 and found["measured_ratio"] < 1
    json.dumps(result.record())


def test_imp_removes_units_to_a_latency_budget(
    small: Backbone, table: Path, no_measuring: None
) -> None:
    imp: dict[str, Any] = {"method": "imp", "imp_structured": True, "imp_steps": 0, "samples": 4}
    result = prune(small, 0.2, budget="latency", latency_table=str(table), **imp)
    left = {n: len(k) for n, k in result.plan.kept.items()}
    gone = sum(4 - k if n.endswith("attn") else 5 * (1 - k / 128) for n, k in left.items())
    assert result.achieved == pytest.approx(gone / 32)
    assert result.record()["latency"]["predicted_ms"] == pytest.approx(32 - gone)


def test_blocks_with_different_heads_are_different_pieces(tower: Tower) -> None:
    before = tower.model()
    attention = tower.dense.get_submodule("transformer.resblocks.0.attn")
    heads, attention.num_heads = attention.num_heads, 2 * attention.num_heads
    try:
        after = LatencyModel.of(tower.dense, [], tower.family, torch.zeros(1, 3, *SIZE))
    finally:
        attention.num_heads = heads
    assert len(set(before.blocks.values())) == 1 and len(set(after.blocks.values())) == 2


def test_half_precision_tower_is_measured(table: Path, no_measuring: None) -> None:
    half = open_clip_vit()
    half.tower.bfloat16()
    options = {**QUICK, "allocation": "uniform", "latency_table": str(table)}
    assert prune(half, 0.2, budget="latency", **options).record()["latency"]["dense_ms"] > 0


def test_other_budgets_record_no_latency(small: Backbone) -> None:
    assert prune(small, 0.5, allocation="uniform", **QUICK).record()["latency"] is None


def test_table_without_latency_budget_is_refused(small: Backbone) -> None:
    with pytest.raises(OptionError, match="--latency-table goes with --budget latency only"):
        prune(small, 0.5, latency_table="x.json", **QUICK)
