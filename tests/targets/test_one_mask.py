"""One mask, found once, goes into every framework of its architecture: the same units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ovsprune.slim import SlimAttention
from ovsprune.slim.cutting import cut_state
from ovsprune.targets import TARGETS
from tests.targets.by_hand import MiniSan, lively_resnet, slim_resnet, small_slim, small_tower
from tests.targets.clipseg_models import clipseg
from tests.targets.mini_clips import MiniCatSeg, MiniOvSeg, with_tower

pytestmark = pytest.mark.framework


def vits(tower: dict[str, Tensor]) -> dict[str, Any]:
    from tests.targets.test_generic import case
    from tests.targets.test_mmseg_disk import small_san

    return {
        "san": MiniSan.with_tower(tower),
        "mmseg-san": small_san(tower),
        "clipseg": clipseg(tower),
        "cat-seg": with_tower(MiniCatSeg, "cat-seg", tower),
        "ovseg": with_tower(MiniOvSeg, "ovseg", tower),
        "generic": case("open_clip")[0],
    }


@pytest.mark.parametrize("weights", ["slim", "target"])
def test_one_vit_mask_everywhere(weights: str) -> None:
    tower = small_tower()
    slim = small_slim(tower)
    cut = cut_state(tower, slim.spec, slim.mask)
    for name, model in vits(tower).items():
        target = TARGETS.get(name)
        with target.attach(model, slim, weights=weights):
            found = target.layout(model.state_dict(), 4).tower_state(model.state_dict())
            assert found.keys() == cut.keys(), name
            own = {"positional_embedding"} if name.endswith("san") else set()
            assert all(torch.equal(found[k], v) for k, v in cut.items() if k not in own), name
            heads = [m.kept_heads for m in model.modules() if isinstance(m, SlimAttention)]
            if name != "clipseg":
                kept = [slim.mask[f"transformer.resblocks.{i}.attn"].tolist() for i in range(3)]
                assert [list(x) for x in heads] == kept, name


def test_one_resnet_mask_everywhere() -> None:
    from tests.targets.test_deeplabv3 import STAGES, deeplab

    tower = lively_resnet(STAGES, width=64)
    slim = slim_resnet(tower)
    model = deeplab()
    own = TARGETS.get("deeplabv3").layout(None, 0).tower_state(model.state_dict())
    cut = cut_state(own, slim.spec, slim.mask)
    with TARGETS.get("deeplabv3").attach(model, slim):
        found = TARGETS.get("deeplabv3").layout(None, 0).tower_state(model.state_dict())
        assert found.keys() == cut.keys() and len(cut) > 50
        assert all(torch.equal(found[name], tensor) for name, tensor in cut.items())
        assert {k: v.shape for k, v in found.items()} == {k: slim.tower()[k].shape for k in found}
