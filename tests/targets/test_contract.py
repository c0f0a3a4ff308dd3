"""Contract of all registered targets; a new target needs no change here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ovsprune.core.errors import TargetError
from ovsprune.slim import SlimCheckpoint
from ovsprune.targets import TARGETS
from ovsprune.targets.key_map import KINDS
from tests.targets.by_hand import in_framework, small_of_kind

DOCS = Path(__file__).parents[2] / "docs" / "targets"
NAMES = pytest.mark.parametrize("name", list(TARGETS))


def cases(name: str, **options: Any) -> list[tuple[dict[str, Tensor], SlimCheckpoint, int]]:
    """Return a small tower of every kind that the target takes, its slim form, and its depth."""
    kinds = TARGETS.get(name).takes
    assert kinds and set(kinds) <= set(KINDS)
    return [small_of_kind(kind, **options) for kind in kinds]


def state_of(name: str, tower: dict[str, Tensor], depth: int) -> dict[str, Any]:
    """Build a checkpoint with the framework's names, as far as its table lists them."""
    target: Any = TARGETS.get(name)
    marks = target.key_map.marks if hasattr(target, "key_map") else ()
    layout = target.layout(None, depth)
    beside = [f"{mark}.weight" for mark in marks if layout.canonical(f"{mark}.weight") is None]
    state: dict[str, Any] = {name: torch.ones(2) for name in [*beside, "adapter.weight"]}
    return state | in_framework(tower, layout)


@NAMES
def test_has_a_page_and_a_summary(name: str) -> None:
    page = (DOCS / f"{name}.md").read_text("utf-8")
    assert f"--target {name}" in page
    assert TARGETS.summary(name)
    assert TARGETS.get(name).framework and TARGETS.get(name).protects


@NAMES
def test_names_go_both_ways_for_every_tensor(name: str) -> None:
    for tower, _, depth in cases(name):
        layout = TARGETS.get(name).layout(None, depth)
        here = {k: v for k, v in tower.items() if layout.absent_reason(k) is None}
        places = {canonical: layout.paths(canonical) for canonical in here}
        every = [path for paths in places.values() for path in paths]
        assert all(places.values()) and len(set(every)) == len(every) >= len(here) > 0
        for canonical, paths in places.items():
            assert {layout.canonical(path) for path in paths} == {canonical}
            assert set(layout.to_framework(canonical, tower[canonical])) == set(paths)
        assert not any(layout.paths(canonical) for canonical in tower.keys() - here.keys())
        back = layout.tower_state(in_framework(here, layout))
        assert back.keys() == here.keys()
        assert all(torch.equal(back[k], v) for k, v in here.items())


@NAMES
def test_lines_are_python_and_name_the_output(name: str) -> None:
    lines = TARGETS.get(name).lines("some where/out")
    compile(lines, name, "exec")
    assert "'some where/out'" in lines


@NAMES
def test_another_model_is_refused_untouched(name: str) -> None:
    target, model = TARGETS.get(name), nn.Sequential(nn.Linear(2, 2))
    assert not target.detect(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for _, slim, _ in cases(name):
        for call in (target.check, target.attach):
            with pytest.raises(TargetError, match="Sequential is not"):
                call(model, slim)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@NAMES
@pytest.mark.parametrize("weights", ["auto", "target"])
def test_conversion_reports_every_key_once(name: str, weights: str) -> None:
    target = TARGETS.get(name)
    for tower, slim, depth in cases(name):
        state = state_of(name, tower, depth)
        result = target.convert(state, slim, weights=weights)
        assert not result.replaced.keys() & result.kept.keys()
        assert result.replaced.keys() | result.kept.keys() == result.state.keys() == state.keys()
        assert all([*result.replaced.values(), *result.kept.values(), *result.dropped.values()])
        slimmer = {k for k, v in result.state.items() if v.shape != state[k].shape}
        assert slimmer and slimmer <= result.replaced.keys()
        assert torch.equal(result.state["adapter.weight"], torch.ones(2))
        with pytest.raises(TargetError, match="slim already"):
            target.convert(result.state, slim, weights=weights)


@NAMES
def test_untrained_base_needs_force(name: str) -> None:
    target = TARGETS.get(name)
    for tower, slim, depth in cases(name, trained=False):
        state = state_of(name, tower, depth)
        with pytest.raises(TargetError, match="random weights .*--force"):
            target.convert(state, slim)
        assert target.convert(state, slim, force=True).replaced


@NAMES
def test_a_tower_of_another_kind_is_refused(name: str) -> None:
    target = TARGETS.get(name)
    for kind in KINDS.keys() - set(target.takes):
        _, slim, _ = small_of_kind(kind)
        tower, _, depth = cases(name)[0]
        with pytest.raises(TargetError, match=r"holds a .* tower .*; .* needs"):
            target.convert(state_of(name, tower, depth), slim)


@NAMES
def test_a_cut_that_changes_the_stream_is_refused(name: str) -> None:
    """Changes a layer outside the blocks, where the framework reads the residual stream."""
    from dataclasses import replace

    from ovsprune.slim.spec import SliceSpec

    for tower, slim, depth in cases(name):
        first = next(x for x in slim.spec.layers if x.slices and x.kept < x.units)
        outside = SliceSpec("elsewhere.ln_1", "out")
        layers = tuple(
            replace(x, slices=(*x.slices, outside)) if x is first else x for x in slim.spec.layers
        )
        extra = {"visual.elsewhere.ln_1.weight": torch.ones(first.kept)}
        wrong = replace(
            slim, spec=replace(slim.spec, layers=layers), tensors={**slim.tensors, **extra}
        )
        with pytest.raises(TargetError, match=r"elsewhere.ln_1"):
            target = TARGETS.get(name)
            target.convert(state_of(name, tower, depth), wrong, weights="auto")
