"""Checks for CAT-Seg and OVSeg, which have their own CLIP, on small models with their names.

The same proofs run on the frameworks' own code in ``test_cat_seg_upstream.py`` and
``test_ovseg_upstream.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ovsprune.core.errors import TargetError
from ovsprune.slim import SlimAttention
from ovsprune.targets import TARGETS
from tests.targets import proofs
from tests.targets.by_hand import (
    load_pictures,
    small_slim,
    small_tower,
    snapshot,
    unchanged,
)
from tests.targets.mini_clips import MiniCatSeg, MiniOvSeg, with_tower
from tests.targets.proofs import Case


def images(model: Any, side: int) -> Tensor:
    return load_pictures(2, side).to(next(model.parameters()).dtype)


def run_cat_seg(model: Any) -> dict[str, Tensor]:
    return dict(model([{"image": image} for image in images(model, 40)]))


def run_ovseg(model: Any) -> dict[str, Tensor]:
    regions = images(model, 32)
    plain = model(regions)
    shown = (regions.mean(1) > 0).to(regions.dtype)
    under = model(regions, shown)
    return {**{f"plain {k}": v for k, v in plain.items()}, **under}


def loss_of(run: Callable[[Any], dict[str, Tensor]]) -> Callable[[Any], Tensor]:
    def loss(model: Any) -> Tensor:
        found = [value.sin().square().mean() for value in run(model).values()]
        return torch.stack(found).sum()

    return loss


def case_of(name: str) -> Case:
    tower = small_tower()
    kind, run, counted, example = {
        "cat-seg": (MiniCatSeg, run_cat_seg, (48, 48), None),
        "ovseg": (MiniOvSeg, run_ovseg, (32, 32), lambda model: torch.zeros(1, 3, 32, 32)),
    }[name]
    return Case(
        name=name,
        tower=tower,
        slim=small_slim(tower),
        build=lambda given: with_tower(kind, name, given),
        run=run,
        loss=loss_of(run),
        heads=4,
        size=32,
        counted=counted,
        example=example,
    )


@pytest.fixture(params=[name for name in ("cat-seg", "ovseg") if name in TARGETS])
def case(request: pytest.FixtureRequest) -> Case:
    return case_of(request.param)


@pytest.fixture
def model(case: Case) -> Any:
    return case.build(case.tower)


def test_is_recognised(case: Case, model: Any) -> None:
    knowing = [name for name in TARGETS if TARGETS.get(name).detect(model)]
    assert [name for name in knowing if not TARGETS.get(name).fallback] == [case.name]
    assert list(case.target.towers(model)) == ["blocks 0-3"]


def test_slim_equals_masked(case: Case, model: Any) -> None:
    proofs.slim_equals_masked(case, model)


def test_slim_equals_masked_in_the_last_block_too(case: Case, model: Any) -> None:
    """Covers removed heads of the last block, which are kept by default."""
    proofs.slim_equals_masked(case, model, case.recut({"transformer.resblocks.3.attn": [0, 2]}))


def test_attentions_and_mlps_may_be_removed_completely(case: Case, model: Any) -> None:
    gone = {"transformer.resblocks.1.attn": [], "transformer.resblocks.2.mlp": []}
    proofs.slim_equals_masked(case, model, case.recut(gone))


def test_gradients_equal_masked(case: Case, model: Any) -> None:
    proofs.gradients_equal_masked(case, model)


@pytest.mark.parametrize("layer", ["transformer.resblocks.1.attn", "transformer.resblocks.2.mlp"])
def test_swapped_unit_is_caught(case: Case, model: Any, layer: str) -> None:
    proofs.swapped_unit_is_caught(case, model, layer)


def test_attach_detach_attach(case: Case, model: Any) -> None:
    proofs.attach_detach_attach(case, model)


def test_costs_drop_by_the_tower_costs(case: Case, model: Any) -> None:
    proofs.costs_drop_by_the_tower_costs(case, model)


def test_tuned_weights_are_cut(case: Case, model: Any) -> None:
    proofs.tuned_weights_are_cut(case, model)


@pytest.mark.parametrize("weights", ["auto", "target"])
def test_round_trip_on_disk(case: Case, model: Any, tmp_path: Path, weights: str) -> None:
    fresh = case.build(small_tower(seed=9))
    record = proofs.round_trip_on_disk(case, model, fresh, tmp_path, weights)
    assert record["weights"] == {"auto": "slim", "target": "target"}[weights]
    assert any(why == "the text tower was not pruned" for why in record["kept"].values())


def test_half_precision_is_still_the_base(case: Case, model: Any) -> None:
    result = case.target.convert(model.half().state_dict(), case.slim)
    assert result.weights == "slim"
    assert {t.dtype for t in result.state.values()} == {torch.float16}


def test_clip_alone_has_the_framework_s_names(case: Case, model: Any) -> None:
    result = case.target.convert(None, case.slim)
    state = model.state_dict()
    tower = {name for name in state if case.layout(model).canonical(name) is not None}
    text = [name for name in result.state if name not in tower]
    assert tower < result.state.keys() <= state.keys() and len(text) == 3
    assert all("clip_model" in name and "visual" not in name for name in text)


def _other_width(slim: Any) -> Any:
    narrow = {k: v[:, :8] if k == "visual.proj" else v for k, v in slim.tensors.items()}
    return replace(slim, tensors=narrow)


def _other_size(slim: Any) -> Any:
    name = "visual.positional_embedding"
    return replace(slim, tensors={**slim.tensors, name: torch.zeros(10, 32)})


def _other_depth(slim: Any) -> Any:
    extra = {k.replace("resblocks.3", "resblocks.4"): v for k, v in slim.tensors.items()}
    return replace(slim, tensors={**slim.tensors, **extra})


def _other_activation(slim: Any) -> Any:
    return replace(slim, spec=replace(slim.spec, activation="gelu"))


def _untrained(slim: Any) -> Any:
    return replace(slim, spec=replace(slim.spec, base=replace(slim.spec.base, trained=False)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_width, r"its proj has shape \(32, 16\), expected \(32, 8\)"),
        (_other_size, "has 16 patch positions, the base of .* has 9: .*another resolution"),
        (_other_depth, "has 4 CLIP blocks here, the slim tower has 5"),
        (_other_activation, "is quick_gelu, but .* was pruned with gelu"),
        (_untrained, "random weights .*--force"),
    ],
)
def test_refused_model_is_unchanged(
    case: Case, model: Any, change: Callable[[Any], Any], message: str
) -> None:
    before, modules = snapshot(model), dict(model.named_modules())
    with pytest.raises(TargetError, match=message):
        case.target.attach(model, change(case.slim))
    assert unchanged(model, before) and dict(model.named_modules()) == modules


def test_a_slim_model_and_another_head_count_are_refused(case: Case, model: Any) -> None:
    with case.target.attach(model, case.slim):
        assert sum(isinstance(m, SlimAttention) for m in model.modules()) == 3
        with pytest.raises(TargetError, match="slim already"):
            case.target.attach(model, case.slim)
    for module in model.modules():
        if getattr(module, "num_heads", None) == 4:
            module.num_heads = 2
    with pytest.raises(TargetError, match=r"0.attn has 2 heads, the base .* has 4"):
        case.target.attach(model, case.slim)
