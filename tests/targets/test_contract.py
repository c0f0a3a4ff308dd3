"""What every registered target must do, by name; a new file is tested without touching this one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ovsprune.core.errors import TargetError
from ovsprune.targets import TARGETS
from tests.targets.by_hand import small_slim, small_tower

DOCS = Path(__file__).parents[2] / "docs" / "targets"
NAMES = pytest.mark.parametrize("name", list(TARGETS))


@NAMES
def test_has_a_page_and_a_summary(name: str) -> None:
    page = (DOCS / f"{name}.md").read_text("utf-8")
    assert f"--target {name}" in page
    assert TARGETS.summary(name)
    assert TARGETS.get(name).framework and TARGETS.get(name).protects


@NAMES
def test_names_go_both_ways_for_every_tensor(name: str) -> None:
    tower = small_tower()
    layout = TARGETS.get(name).layout(None, 4)
    there = {canonical: layout.name(canonical) for canonical in tower}
    assert None not in there.values() and len(set(there.values())) == len(tower)
    assert {layout.canonical(str(path)) for path in there.values()} == set(tower)
    for canonical, tensor in tower.items():
        moved = layout.to_framework(canonical, tensor)
        assert torch.equal(layout.to_canonical(canonical, moved), tensor)


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
    for call in (target.check, target.attach):
        with pytest.raises(TargetError, match="Sequential is not"):
            call(model, small_slim())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@NAMES
@pytest.mark.parametrize("weights", ["slim", "target"])
def test_conversion_accounts_for_every_key_once(name: str, weights: str) -> None:
    target, tower, slim = TARGETS.get(name), small_tower(), small_slim()
    layout = target.layout(None, 4)
    state: dict[str, Any] = {"adapter.weight": torch.ones(2)}
    for canonical, tensor in tower.items():
        state[str(layout.name(canonical))] = layout.to_framework(canonical, tensor)
    result = target.convert(state, slim, weights=weights)
    assert not result.replaced.keys() & result.kept.keys()
    assert result.replaced.keys() | result.kept.keys() == result.state.keys() == state.keys()
    assert all([*result.replaced.values(), *result.kept.values(), *result.dropped.values()])
    slimmer = {k for k, v in result.state.items() if v.shape != state[k].shape}
    assert slimmer and slimmer <= result.replaced.keys()
    assert torch.equal(result.state["adapter.weight"], torch.ones(2))


@NAMES
def test_untrained_base_needs_force(name: str) -> None:
    slim = small_slim(trained=False)
    with pytest.raises(TargetError, match="random weights .*--force"):
        TARGETS.get(name).convert(None, slim)
    assert TARGETS.get(name).convert(None, slim, force=True).replaced
