"""Attention of the last block: compared with the formulas, computed head by head."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from ovsprune.core.errors import OptionError
from ovsprune.core.protocols import Backbone
from ovsprune.evaluation.last_block import VARIANTS, attend, dense_with
from ovsprune.slim import SlimAttention
from tests.contracts.conftest import open_clip_fastvit, open_clip_vit

HEADS, WIDTH = 4, 24
TOKENS = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def attention() -> nn.MultiheadAttention:
    torch.manual_seed(0)
    found = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval().requires_grad_(False)
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=0.4)
    return found


def written_out(attention: nn.MultiheadAttention, pairs: tuple[str, ...], kept: range) -> Tensor:
    """Compute the attention head by head and token by token."""
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    q, k, v = (TOKENS @ w.T + b for w, b in zip(weight.chunk(3), bias.chunk(3), strict=True))
    width = WIDTH // HEADS
    out = attention.out_proj.bias.expand_as(TOKENS).clone()
    for head in kept:
        at = slice(head * width, (head + 1) * width)
        part = {"q": q[..., at], "k": k[..., at], "v": v[..., at]}
        mixed = part["v"] if not pairs else torch.zeros_like(part["v"])
        for one, other in pairs:
            logits = part[one] @ part[other].mT / width**0.5
            mixed = mixed + logits.softmax(-1) @ part["v"]
        out += mixed @ attention.out_proj.weight[:, at].T
    return out


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_equals_its_formula(attention: nn.MultiheadAttention, name: str) -> None:
    pairs = VARIANTS[name].pairs
    expected = written_out(attention, pairs, range(HEADS))
    torch.testing.assert_close(attend(attention, TOKENS, pairs), expected, atol=1e-5, rtol=1e-5)
    if pairs != ("qk",):
        trained = attention(TOKENS, TOKENS, TOKENS)[0]
        assert (expected - trained).abs().max() > 0.05


@pytest.mark.parametrize("pairs", [("qk",), ("vv",), ()])
def test_slim_attention_uses_its_kept_heads(
    attention: nn.MultiheadAttention, pairs: tuple[str, ...]
) -> None:
    slim = SlimAttention.from_dense(attention, (1, 2))
    expected = written_out(attention, pairs, range(1, 3))
    torch.testing.assert_close(attend(slim, TOKENS, pairs), expected, atol=1e-5, rtol=1e-5)
    nothing = attend(SlimAttention.from_dense(attention, ()), TOKENS, pairs)
    torch.testing.assert_close(nothing, attention.out_proj.bias.expand_as(TOKENS))


@pytest.fixture
def backbone() -> Backbone:
    return open_clip_vit()


def draw_images(backbone: Backbone) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 3, *backbone.preprocess.size, generator=generator)


@torch.no_grad()
def test_qk_equals_the_dense_output_of_the_tower(backbone: Backbone) -> None:
    images = draw_images(backbone)
    own = backbone.dense(images)
    torch.testing.assert_close(dense_with(backbone, "qk")(images), own, atol=1e-4, rtol=1e-4)
    others = [dense_with(backbone, name)(images) for name in VARIANTS if name != "qk"]
    for i, one in enumerate([own, *others]):
        for other in others[i:]:
            assert one.shape == other.shape and (one - other).abs().max() > 1e-3


@torch.no_grad()
def test_clearclip_omits_residual_and_mlp(backbone: Backbone) -> None:
    images = draw_images(backbone)
    before = {name: dense_with(backbone, name)(images) for name in ("qq", "clearclip")}
    other = deepcopy(backbone)
    last = list(other.stages(other.tower).blocks.values())[-1]
    last.mlp.c_proj.weight.mul_(3.0)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(dense_with(other, "clearclip")(images), before["clearclip"])
    assert (dense_with(other, "qq")(images) - before["qq"]).abs().max() > 1e-3


def test_an_unknown_variant_is_refused(backbone: Backbone) -> None:
    with pytest.raises(OptionError, match="'kq' is unknown; known: qk, qq, kk, vv, maskclip"):
        dense_with(backbone, "kq")


def test_tower_without_a_plain_last_block_is_refused() -> None:
    with pytest.raises(OptionError, match="open_clip-fastvit, whose last block has no ln_1"):
        dense_with(open_clip_fastvit(), "maskclip")
