"""Directions inside heads as groups: they can be cut beside heads, and cost what is said."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from ovsprune.allocation.trim import cost
from ovsprune.backbones import FAMILIES
from ovsprune.calibration.head_bases import find_bases
from ovsprune.core.errors import OptionError
from ovsprune.core.progress import Silent
from ovsprune.core.protocols import AllocationContext, Budget
from ovsprune.core.records import Plan, Scores
from ovsprune.graph.costs import measure
from ovsprune.graph.cut import cut, mask
from ovsprune.graph.head_widths import turn, width_seeds, with_directions
from ovsprune.recovery import RECOVERIES
from ovsprune.slim import SlimAttention
from tests.contracts.conftest import Case, open_clip_vit, prepared
from tests.contracts.test_recoveries import recover


@pytest.fixture(scope="module")
def turned() -> Case:
    """A small tower in the bases of its heads, with directions among its groups."""
    case = prepared(open_clip_vit())
    family = FAMILIES.get(case.backbone.family)
    seeds = [s for s in width_seeds(family.seeds(case.dense)) if not s.protected]
    case.groups = with_directions(case.dense, case.groups, seeds, case.backbone.preprocess.size)
    found = find_bases(
        case.dense,
        case.backbone.stages(case.dense),
        seeds,
        case.pictures,
        batch_size=5,
        progress=Silent(),
    )
    turn(case.dense, found.bases)
    return case


def test_directions_follow_the_heads_that_they_lie_in(turned: Case) -> None:
    names = [g.name.removeprefix("transformer.resblocks.") for g in turned.groups]
    assert names == [
        "0.attn", "0.attn.qk", "0.attn.vo", "0.mlp",
        "1.attn", "1.attn.qk", "1.attn.vo", "1.mlp", "2.mlp",
    ]  # fmt: skip
    qk, vo = turned.groups[1:3]
    assert (qk.units, vo.units) == (16, 16)
    parts = [{(s.module.rpartition(".")[2], s.axis) for s in g.slices} for g in (qk, vo)]
    assert parts == [
        {("q_proj", "out"), ("k_proj", "out")},
        {("v_proj", "out"), ("out_proj", "in")},
    ]
    assert vo.columns[3].tolist() == [3, 19, 35, 51]  # Direction 3 of each of the four heads.
    assert vo.has_columns and not qk.has_columns


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.25, 0.6])
def test_cut_equals_masked(turned: Case, seed: int, share: float) -> None:
    """Any heads and any directions at once, not the last ones alone."""
    plan = turned.random_plan(seed, share)
    slim, masked = deepcopy(turned.dense), deepcopy(turned.dense)
    cut(slim, turned.groups, plan)
    mask(masked, turned.groups, plan)
    FAMILIES.get(turned.backbone.family).finish(slim, turned.groups, plan)
    first = slim.get_submodule("transformer.resblocks.0.attn")
    assert isinstance(first, SlimAttention)
    assert (first.qk_dim, first.v_dim, first.head_dim) == (round(16 * share), round(16 * share), 16)
    images = turned.images()
    expected = turned.outputs(masked, images)
    assert (turned.outputs(slim, images) - expected).abs().max() / expected.std() < 1e-4


def test_the_cost_of_heads_times_widths_is_exact(turned: Case) -> None:
    size = turned.backbone.preprocess.size
    plan = turned.random_plan(1)
    slim = deepcopy(turned.dense)
    cut(slim, turned.groups, plan)
    widths = {g.name: plan.width(g.name) for g in turned.groups}
    before, after = measure(turned.dense, size), measure(slim, size)
    for kind, dense, left in (
        ("macs", before.macs, after.macs),
        ("params", before.params, after.params),
    ):
        item = AllocationContext(turned.groups, Scores({}, {}), Budget(kind, dense, 0.0), None)
        assert cost(item, widths) == pytest.approx(left, rel=1e-12)


@pytest.mark.parametrize("recovery", RECOVERIES.names())
def test_keeping_everything_gives_the_original(turned: Case, recovery: str) -> None:
    plan = turned.full_plan()
    slim = deepcopy(turned.dense)
    cut(slim, turned.groups, plan)
    recover(turned, slim, plan, recovery)
    after = slim.state_dict()
    assert all(torch.equal(after[k], v) for k, v in turned.dense.state_dict().items())


@pytest.mark.parametrize("recovery", ["bias", "closed-form", "closed-form-symmetric"])
def test_a_repair_of_lost_directions_brings_something(turned: Case, recovery: str) -> None:
    keep = {g.name: g.units * (1 if g.inside is None else 0.5) for g in turned.groups}
    plan = Plan({name: torch.arange(int(width)) for name, width in keep.items()})
    images = turned.images(8)
    wanted = turned.outputs(turned.dense, images)
    before = (turned.outputs(turned.cut(plan), images) - wanted).norm()
    slim = turned.cut(plan)
    recover(turned, slim, plan, recovery)
    assert (turned.outputs(slim, images) - wanted).norm() < 0.95 * before


def test_the_last_directions_matter_least(turned: Case) -> None:
    """Half of the directions gone: the last lose less than the first, and than any at random."""
    images = turned.images(8)
    wanted = turned.outputs(turned.dense, images)

    def lost(kind: str, kept: torch.Tensor) -> float:
        plan = {g.name: kept if g.kind == kind else torch.arange(g.units) for g in turned.groups}
        return float((turned.outputs(turned.cut(Plan(plan)), images) - wanted).norm())

    for kind in ("qk", "vo"):
        ours = lost(kind, torch.arange(8))
        assert ours < 0.5 * lost(kind, torch.arange(8, 16))
        for seed in range(3):
            order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
            assert ours < lost(kind, order[:8].sort().values)


@pytest.mark.parametrize("width", [0, 17])
def test_a_width_beyond_the_head_is_refused(width: int) -> None:
    with pytest.raises(OptionError, match=f"qk_dim is {width}, expected 1 to 16"):
        SlimAttention(64, 4, [0, 2], qk_dim=width)
