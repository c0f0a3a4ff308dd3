"""MACs and parameters: exact counts, and no side effects."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ovsprune.core.records import Costs
from ovsprune.graph import costs
from ovsprune.graph.costs import count_costs, macs, on_meta
from ovsprune.graph.groups import with_costs
from ovsprune.graph.products import find_products
from tests.contracts.conftest import REPRESENTATIVES, case_of


@pytest.fixture(autouse=True)
def _counted_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count as in production; other tests count on the CPU."""
    monkeypatch.setattr(costs, "COUNT_ON", "meta")


@pytest.mark.parametrize("family", REPRESENTATIVES)
def test_counts_do_not_depend_on_the_device(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(family)
    tower, size = case.dense, case.backbone.preprocess.size
    found = []
    for device in ("meta", "cpu"):
        monkeypatch.setattr(costs, "COUNT_ON", device)
        groups = with_costs(tower, case.groups[:1], size)
        found.append((count_costs(tower, size), find_products(tower, size), groups))
    assert str(found[0]) == str(found[1])
    assert found[0][0].macs > 0 and found[0][2][0].macs > 0


def test_costs_of_vit_b_16() -> None:
    open_clip = pytest.importorskip("open_clip")
    with torch.device("meta"):
        tower = open_clip.CLIP(**open_clip.get_model_config("ViT-B-16")).visual
    costs = count_costs(tower, (224, 224))
    assert costs.params == 86_192_640
    assert costs.macs == pytest.approx(17.563e9, rel=1e-3)


def test_macs_of_a_linear_layer() -> None:
    assert macs(nn.Linear(5, 7), torch.zeros(3, 5)) == 3 * 5 * 7


def test_attention_is_counted_in_training_and_evaluation_mode() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    x = torch.zeros(2, 10, 32)
    by_hand = 2 * (10 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * 10 * 10 * 32)
    assert macs(layer.train(), x) == by_hand
    assert macs(layer.eval(), x) == by_hand


def test_the_fast_path_flag_is_restored() -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    macs(nn.Linear(2, 2), torch.zeros(1, 2))
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_counting_leaves_the_weights_unchanged() -> None:
    tower = nn.Sequential(nn.Conv2d(3, 4, 2, 2), nn.BatchNorm2d(4))
    before = {k: v.clone() for k, v in tower.state_dict().items()}
    assert count_costs(tower, (8, 8)) == Costs(16 * 3 * 4 * 4, 3 * 4 * 4 + 4 + 8)
    assert all(torch.equal(v, before[k]) for k, v in tower.state_dict().items())
    assert all(p.device.type == "meta" for p in on_meta(tower).parameters())
