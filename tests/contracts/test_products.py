"""Weights that multiply are found in the towers of every family."""

from __future__ import annotations

from ovsprune.graph.costs import count_costs
from ovsprune.graph.products import find_products
from tests.contracts.conftest import Case


def test_every_family_begins_with_the_picture(case: Case) -> None:
    """Rewritten or not; what is left of the cost is attention's products and the projection."""
    size = case.backbone.preprocess.size
    for tower in (case.backbone.tower, case.dense):
        found = find_products(tower, size)
        parameters = dict(tower.named_parameters())
        assert all(p.shape == tuple(parameters[p.name].shape) for p in found)
        assert found[0].shape[1] == 3
        total = sum(p.macs for p in found)
        assert 0.7 * count_costs(tower, size).macs < total <= count_costs(tower, size).macs


def test_fused_and_separate_attention_cost_the_same(case: Case) -> None:
    size = case.backbone.preprocess.size
    fused, separate = (find_products(t, size) for t in (case.backbone.tower, case.dense))
    assert sum(p.macs for p in fused) == sum(p.macs for p in separate)
