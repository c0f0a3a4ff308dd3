"""Equality of slim and masked models in mmsegmentation's SAN, and failures of the bound."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ovsprune.core.errors import TargetError
from ovsprune.slim import SlimAttention, SlimCheckpoint
from ovsprune.targets import TARGETS
from ovsprune.targets.mmseg_build import run_san
from tests.targets.by_hand import (
    error,
    load_pictures,
    magnitude_kept,
    masked,
    random_kept,
    slim_by_hand,
)

pytestmark = pytest.mark.framework

BOUND = 1e-4
TARGET = TARGETS.get("mmseg-san")
Tower = dict[str, Tensor]


def outputs(san: nn.Module, side: int = 256, count: int = 1) -> dict[str, Tensor]:
    """Return the compared outputs: mask proposals, their class logits, and the segmentation."""
    found = run_san(san, load_pictures(count, side))
    return {name: found[name] for name in ("masks", "logits", "segmentation")}


def dense_masked(san: nn.Module, slim: Any, side: int = 256, count: int = 1) -> dict[str, Tensor]:
    with masked(san, slim, TARGET.layout(san.state_dict(), 12)):
        return outputs(san, side, count)


@pytest.fixture(scope="module")
def slims(vit_b: Tower) -> dict[str, SlimCheckpoint]:
    """Choose kept units in two ways, both different from block to block."""
    kept = {
        "random": random_kept(12, 12, 3072, seed=1),
        "magnitude": magnitude_kept(vit_b, 12, share=0.5),
    }
    first = slim_by_hand(vit_b, kept["random"], heads=12, size=224)
    second = slim_by_hand(vit_b, kept["magnitude"], heads=12, size=224, base=first.spec.base)
    for slim in (first, second):
        assert len({layer.kept for layer in slim.spec.layers if layer.kind == "heads"}) > 2
    return {"random": first, "magnitude": second}


@pytest.fixture(scope="module")
def slim(slims: dict[str, SlimCheckpoint]) -> SlimCheckpoint:
    return slims["random"]


@pytest.fixture(scope="module")
def wanted(_san: nn.Module, slim: SlimCheckpoint) -> dict[str, Tensor]:
    """Return the dense model's output with the units that ``slim`` cuts masked to zero."""
    return dense_masked(_san, slim)


def test_bias_is_strong_and_differs_between_heads(san: nn.Module) -> None:
    bias = run_san(san, load_pictures(2, 320))["bias"].transpose(0, 1).flatten(1)
    assert bias.std(dim=1).min() >= 1
    assert torch.corrcoef(bias).fill_diagonal_(0).abs().max() < 0.9


@pytest.mark.parametrize(
    ("which", "side", "count"),
    [("random", 320, 2), pytest.param("magnitude", 640, 1, marks=pytest.mark.slow)],
)
def test_slim_equals_dense_masked(
    san: nn.Module, slims: dict[str, SlimCheckpoint], which: str, side: int, count: int
) -> None:
    slim = slims[which]
    wanted = dense_masked(san, slim, side, count)
    with TARGET.attach(san, slim, weights="slim") as attached:
        found = outputs(san, side, count)
        assert attached.params_after < attached.params_before
    errors = error(found, wanted)
    print(which, side, errors)
    assert max(errors.values()) <= BOUND


def test_the_cut_changes_the_output(san: nn.Module, wanted: dict[str, Tensor]) -> None:
    assert min(error(outputs(san), wanted).values()) > 1000 * BOUND


def test_rolled_bias_is_caught(
    san: nn.Module, slim: SlimCheckpoint, wanted: dict[str, Tensor]
) -> None:

    def roll(module: nn.Module, args: Any, options: dict[str, Any]) -> Any:
        bias = options["attn_mask"].unflatten(0, (-1, 12)).roll(1, dims=1)
        return args, {**options, "attn_mask": bias.flatten(0, 1)}

    with TARGET.attach(san, slim, weights="slim"):
        blocks: Any = san.get_submodule("decode_head.rec_with_attnbias.layers")
        slims = [b.attentions[0].attn for b in blocks]
        assert any(isinstance(a, SlimAttention) for a in slims)
        hooks = [a.register_forward_pre_hook(roll, with_kwargs=True) for a in slims]
        try:
            found = outputs(san)
        finally:
            for hook in hooks:
                hook.remove()
    errors = error(found, wanted)
    print("rolled", errors)
    assert errors["logits"] >= 100 * BOUND and errors["segmentation"] >= 100 * BOUND


@pytest.mark.parametrize(
    "layer",
    [
        "transformer.resblocks.2.attn",
        "transformer.resblocks.10.attn",
        "transformer.resblocks.11.mlp",
    ],
)
def test_swapped_unit_is_caught(
    san: nn.Module, vit_b: Tower, slim: SlimCheckpoint, wanted: dict[str, Tensor], layer: str
) -> None:
    kept = {name: chosen.tolist() for name, chosen in slim.mask.items()}
    units = 12 if layer.endswith("attn") else 3072
    chosen = kept[layer]
    other = sorted(set(range(units)) - set(chosen))
    if layer.endswith("mlp"):  # of 3072 units many hardly matter: exchange the weightiest
        norm = vit_b[f"{layer}.c_proj.weight"].norm(dim=0)
        gone, new = max(chosen, key=norm.__getitem__), max(other, key=norm.__getitem__)
    else:
        gone, new = chosen[0], other[0]
    swapped = {**kept, layer: sorted({*chosen, new} - {gone})}
    wrong = slim_by_hand(vit_b, swapped, heads=12, size=224, base=slim.spec.base)
    with TARGET.attach(san, wrong, weights="slim"):
        errors = error(outputs(san), wanted)
    print("swapped", layer, errors)
    assert errors["logits"] >= 100 * BOUND


def test_target_weights_are_cut_by_the_mask(san: nn.Module, slim: SlimCheckpoint) -> None:
    with TARGET.attach(san, slim, weights="target"):
        cut = {k: v.clone() for k, v in san.state_dict().items()}
    with TARGET.attach(san, slim, weights="slim"):
        loaded = san.state_dict()
        assert loaded.keys() == cut.keys()
        assert all(torch.equal(cut[name], loaded[name]) for name in cut)


def test_auto_distinguishes_base_and_finetuned_weights(
    san: nn.Module, slim: SlimCheckpoint
) -> None:
    weights, reason = TARGET.check(san, slim)
    assert weights == "slim"
    assert reason == "all 151 tensors of the framework's tower equal the base's"
    name = "transformer.resblocks.5.mlp.c_fc.weight"
    other = {**slim.spec.base.tensors, name: "0" * 64}
    base = replace(slim.spec.base, tensors=other, half={})
    weights, reason = TARGET.check(san, replace(slim, spec=replace(slim.spec, base=base)))
    assert weights == "target"
    assert f"1 of 151 tensors of the framework's tower differ from the base's ({name}" in reason


def test_detach_restores_bit_for_bit(san: nn.Module, slim: SlimCheckpoint) -> None:
    changed = {k: v + 0.01 if k.endswith("ln_1.bias") else v for k, v in slim.tensors.items()}
    slim = replace(slim, tensors=changed)
    modules = dict(san.named_modules())
    before = {k: (id(v), v.clone()) for k, v in san.state_dict(keep_vars=True).items()}
    hooks = len(san._load_state_dict_pre_hooks)
    attached = TARGET.attach(san, slim, weights="slim")
    assert attached.replaced["image_encoder.layers.3.ln1.bias"] == "value of the slim tower"
    assert "image_encoder.pos_embed" in attached.kept
    assert attached.replaced["image_encoder.layers.3.attn.attn"].endswith("of 12 heads")
    assert dict(san.named_modules()) != modules
    attached.detach()
    attached.detach()
    after = san.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(
        id(after[k]) == i and torch.equal(after[k].detach(), v.detach())
        for k, (i, v) in before.items()
    )
    now = dict(san.named_modules())
    assert list(now) == list(modules) and all(now[name] is modules[name] for name in modules)
    assert len(san._load_state_dict_pre_hooks) == hooks


def test_dense_checkpoint_is_refused_while_slim(san: nn.Module, slim: SlimCheckpoint) -> None:
    dense = dict(san.state_dict())
    adapter = {k: v for k, v in dense.items() if "side_adapter" in k}
    fitting = {k: v for k, v in dense.items() if ".attn.attn." not in k}  # as detectron2 drops them
    with TARGET.attach(san, slim, weights="slim"):
        for state in (dense, fitting):
            with pytest.raises(TargetError, match="not of the slim model.*ovsprune transfer"):
                san.load_state_dict(state, strict=False)
    assert adapter.keys() < dense.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "gelu"}, "is quick_gelu, but .* was pruned with gelu"),
        ({"trained": False}, "random weights .*--force"),
    ],
)
def test_check_refuses(
    san: nn.Module, slim: SlimCheckpoint, change: dict[str, Any], message: str
) -> None:
    if "trained" in change:
        change = {"base": replace(slim.spec.base, **change)}
    slim = replace(slim, spec=replace(slim.spec, **change))
    before = dict(san.named_modules())
    with pytest.raises(TargetError, match=message):
        TARGET.attach(san, slim)
    assert dict(san.named_modules()) == before


def test_check_refuses_what_is_slim_already(san: nn.Module, slim: SlimCheckpoint) -> None:
    with TARGET.attach(san, slim), pytest.raises(TargetError, match="slim already; detach first"):
        TARGET.attach(san, slim)


def test_check_refuses_cross_attention_with_cut_heads(san: nn.Module, slim: SlimCheckpoint) -> None:
    head: Any = san.get_submodule("decode_head.rec_with_attnbias")
    head.cross_attn = True
    try:
        with pytest.raises(TargetError, match="cross_attn on.*resblocks.9.attn"):
            TARGET.check(san, slim)
    finally:
        head.cross_attn = False


def test_check_refuses_a_changed_width(san: nn.Module, slim: SlimCheckpoint) -> None:
    narrow = {k: v[:, :256] if k == "visual.proj" else v for k, v in slim.tensors.items()}
    with pytest.raises(TargetError, match=r"its proj has shape \(768, 512\), expected \(768, 256"):
        TARGET.check(san, replace(slim, tensors=narrow))
