"""Tests that masks are matched to parameters by name and shape."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from ovsprune.core.errors import TargetError
from ovsprune.masks import apply_masks, match
from tests.masks.towers import Tower, holding, random_masks


def test_equal_names_match() -> None:
    masks = random_masks(Tower())
    found = match(Tower(), masks)
    assert (found.removed, found.added, found.missing, found.shapes) == ("", "", (), {})
    assert found.names == {name: name for name in masks}


@pytest.mark.parametrize("place", ["backbone", "sem_seg_head.predictor.clip_model.visual"])
def test_tower_inside_a_model(place: str) -> None:
    masks = random_masks(Tower())
    found = match(holding(place, Tower(1)), masks)
    assert found.added == place
    assert found.names == {name: f"{place}.{name}" for name in masks}


@pytest.mark.parametrize("prefix", ["module", "module.visual"])
def test_common_prefix_of_the_masks_is_removed(prefix: str) -> None:
    masks = {f"{prefix}.{name}": mask for name, mask in random_masks(Tower()).items()}
    found = match(holding("backbone", Tower()), masks)
    assert (found.removed, found.added) == (prefix, "backbone")
    assert found.names[f"{prefix}.stem.weight"] == "backbone.stem.weight"


def test_masks_of_one_block_match_that_block() -> None:
    """Do not remove the common prefix: all blocks have the same shapes and would match."""
    masks = {k: v for k, v in random_masks(Tower()).items() if k.startswith("blocks.1.")}
    for model, place in ((Tower(), ""), (holding("backbone", Tower()), "backbone.")):
        found = match(model, masks)
        assert found.names == {name: f"{place}{name}" for name in masks}


def test_two_towers_need_a_prefix() -> None:
    masks = random_masks(Tower())
    model = nn.ModuleDict({"student": Tower(1), "teacher": Tower(2)})
    with pytest.raises(
        TargetError, match=r"fit 2 places .*'student', 'teacher'; choose one with prefix"
    ):
        match(model, masks)
    assert match(model, masks, prefix="teacher").added == "teacher"
    before = {k: v.clone() for k, v in model["student"].state_dict().items()}
    apply_masks(model, masks, prefix="teacher")
    assert all(torch.equal(v, before[k]) for k, v in model["student"].state_dict().items())


def test_outer_tower_takes_precedence() -> None:
    tower = Tower(1)
    tower.teacher = Tower(2)
    assert match(tower, random_masks(Tower())).added == ""


def test_mismatches_are_reported_without_changes() -> None:
    masks = random_masks(Tower())
    masks["attnpool.weight"] = torch.ones(2, 2, dtype=torch.bool)
    masks["stem.weight"] = torch.ones(3, dtype=torch.bool)
    tower = Tower(1)
    before = {k: v.clone() for k, v in tower.state_dict().items()}
    with pytest.raises(TargetError, match=r"1 have none \(attnpool.weight\).*stem.weight: mask"):
        apply_masks(tower, masks)
    assert all(torch.equal(v, before[k]) for k, v in tower.state_dict().items())
    found = apply_masks(tower, masks, strict=False).placement
    assert found.missing == ("attnpool.weight",)
    assert found.shapes == {"stem.weight": ((3,), (4, 3, 2, 2))}
    assert set(found.names) == set(masks) - {"attnpool.weight", "stem.weight"}
    assert torch.equal(tower.stem.weight, before["stem.weight"])


def test_no_match_is_refused() -> None:
    masks = random_masks(Tower())
    with pytest.raises(TargetError, match=r"none of the 5 masks .*stem.weight.*, the parameters"):
        match(nn.Linear(2, 2), masks)
    with pytest.raises(TargetError, match=r"the parameters \(there are none\)"):
        match(nn.ReLU(), masks)
    with pytest.raises(TargetError, match="under the prefix 'elsewhere'"):
        match(Tower(), masks, prefix="elsewhere")
    with pytest.raises(TargetError, match="there are no masks"):
        match(Tower(), {})


def test_module_pruned_by_torch_is_refused() -> None:
    layer = nn.Linear(3, 2)
    mask = torch.ones(2, 3)
    prune.custom_from_mask(layer, "weight", mask)
    with pytest.raises(TargetError, match="call prune.remove"):
        match(layer, {"weight": mask.bool()})
