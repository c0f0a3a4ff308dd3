"""Transfer of one mask to all frameworks of its architecture, with the same units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ovsprune.slim import SlimAttention
from ovsprune.slim.cutting import cut_state
from ovsprune.targets import TARGETS
from tests.targets.by_hand import MiniSan, lively_resnet, put, slim_resnet, small_slim, small_tower
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


def resnets(tower: dict[str, Tensor], *, real: bool) -> list[tuple[str, Any]]:
    """Build all frameworks that take CLIP's ResNet, with the weights of ``tower`` if possible.

    Args:
        tower: Of the widths of RN50 where ``real``, an eighth of them otherwise.
        real: Take the frameworks' own models.
    """
    kinds = ("clip", "unpooled", "plain")
    if real:
        from tests.targets.detectron2_models import fc_clip, mask2former
        from tests.targets.test_deeplabv3 import deeplab

        found = [("fc-clip", fc_clip("resnet")), ("deeplabv3", deeplab())]
        found += [("mask2former", mask2former(kind)) for kind in kinds]
    else:
        from tests.targets.mini_detectron2 import MiniFcClip, MiniMask2Former

        found = [("fc-clip", MiniFcClip("resnet"))]
        found += [("mask2former", MiniMask2Former(kind)) for kind in kinds]
    for name, model in found:
        layout = TARGETS.get(name).layout(model.state_dict(), 0)
        own = layout.tower_state(model.state_dict())
        # an attention pool may be missing, or have positions of its own
        here = {k: v for k, v in tower.items() if k in own and v.shape == own[k].shape}
        put(model, {**own, **here}, layout)
    return found


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.upstream)])
def test_one_resnet_mask_everywhere(real: bool) -> None:
    tower = lively_resnet([1, 1, 1, 1], width=64 if real else 8)
    slim = slim_resnet(tower)
    for name, model in resnets(tower, real=real):
        target = TARGETS.get(name)
        layout = target.layout(model.state_dict(), 0)
        own = {k: v.clone() for k, v in layout.tower_state(model.state_dict()).items()}
        cut = cut_state(own, slim.spec, slim.mask)
        with target.attach(model, slim, weights="target"):
            found = layout.tower_state(model.state_dict())
            assert found.keys() == cut.keys() and len(cut) > 50, name
            assert all(torch.equal(found[k], tensor) for k, tensor in cut.items()), name
            for layer in slim.spec.layers:
                module: Any = model.get_submodule(str(layout.name(layer.name)))
                assert module.out_channels == len(slim.mask[layer.name]) < layer.units, name


def test_one_resnet_mask_in_torchvisions_deeplabv3() -> None:
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
