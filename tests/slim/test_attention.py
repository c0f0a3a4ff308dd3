from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ovsprune.core.errors import OptionError, TargetError
from ovsprune.slim.attention import SlimAttention
from ovsprune.slim.attention_masks import gather_heads

N, L, S, E, H = 2, 5, 7, 48, 6
KEPT = (0, 2, 3, 5)


def dense_attention(batch_first: bool = True, bias: bool = True) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(E, H, batch_first=batch_first, bias=bias).eval()
    for parameter in mha.parameters():
        nn.init.normal_(parameter, std=0.3)
    return mha


def masked_attention(mha: nn.MultiheadAttention, kept: tuple[int, ...]) -> nn.MultiheadAttention:
    masked = copy.deepcopy(mha)
    with torch.no_grad():
        for head in set(range(H)) - set(kept):
            masked.out_proj.weight[:, head * 8 : (head + 1) * 8] = 0.0
    return masked


def ordered(x: Tensor, batch_first: bool) -> Tensor:
    return x if batch_first else x.transpose(0, 1)


def causal() -> Tensor:
    return torch.ones(L, S).triu(3).bool()


MASKS: dict[str, Callable[[], Tensor | None]] = {
    "none": lambda: None,
    "2-D float": lambda: torch.randn(L, S),
    "2-D bool": causal,
    "3-D float": lambda: 3 * torch.randn(N * H, L, S),
    "3-D bool": lambda: torch.rand(N * H, L, S) > 0.6,
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padding", ["none", "bool", "float"])
@pytest.mark.parametrize("form", MASKS)
def test_equals_the_dense_module_with_removed_heads_masked(
    form: str, padding: str, need_weights: bool, batch_first: bool
) -> None:
    mha = dense_attention(batch_first)
    masked = masked_attention(mha, KEPT)
    slim = SlimAttention.from_dense(mha, KEPT)
    torch.manual_seed(1)
    query, memory = torch.randn(N, L, E), torch.randn(N, S, E)
    mask = MASKS[form]()
    if mask is not None and mask.dtype == torch.bool:
        mask[..., 0] = False  # softmax over no key would be NaN
    pad = None
    if padding != "none":
        pad = torch.zeros(N, S, dtype=torch.bool)
        pad[1, 4:] = True
        if padding == "float" or (mask is not None and mask.is_floating_point()):
            pad = torch.zeros(N, S).masked_fill(pad, -1.5)
        if mask is not None and mask.dtype == torch.bool and pad.is_floating_point():
            mask = torch.zeros(mask.shape).masked_fill(
                mask, float("-inf")
            )  # torch needs masks of one type
    inputs = [ordered(x, batch_first) for x in (query, memory, memory)]
    options = {"attn_mask": mask, "key_padding_mask": pad}
    expected, _ = masked(*inputs, need_weights=False, **options)
    out, weights = slim(*inputs, need_weights=need_weights, **options)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    if need_weights:
        _, per_head = mha(*inputs, average_attn_weights=False, **options)
        torch.testing.assert_close(weights, per_head[:, KEPT].mean(1), atol=1e-5, rtol=1e-5)
    else:
        assert weights is None


def test_attention_weights_per_head_are_those_of_the_kept_heads() -> None:
    mha = dense_attention()
    slim = SlimAttention.from_dense(mha, KEPT)
    x = torch.randn(N, L, E)
    _, expected = mha(x, x, x, average_attn_weights=False)
    _, weights = slim(x, x, x, need_weights=True, average_attn_weights=False)
    torch.testing.assert_close(weights, expected[:, KEPT], atol=1e-5, rtol=1e-5)


def test_per_head_masks_in_the_wrong_order_change_the_output() -> None:
    """Check that the comparison above can fail."""
    mha = dense_attention()
    slim = SlimAttention.from_dense(mha, KEPT)
    x, mask = torch.randn(N, L, E), 3 * torch.randn(N, H, L, L)
    right = slim(x, attn_mask=mask.flatten(0, 1))[0]
    wrong = slim(x, attn_mask=mask.roll(1, dims=1).flatten(0, 1))[0]
    assert (right - wrong).abs().max() > 0.1


@pytest.mark.parametrize("batch_first", [True, False])
def test_cross_attention_with_different_query_key_and_value(batch_first: bool) -> None:
    mha = dense_attention(batch_first)
    slim = SlimAttention.from_dense(mha, KEPT)
    q, k, v = (ordered(torch.randn(N, n, E), batch_first) for n in (L, S, S))
    expected = masked_attention(mha, KEPT)(q, k, v, need_weights=False)[0]
    torch.testing.assert_close(slim(q, k, v)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "shape",
    [(N * H, L, L), (N * len(KEPT), L, L), (H, L, L), (N, H, L, L), (1, H, L, L), (N, 1, L, L),
     (N, len(KEPT), L, L)],
)  # fmt: skip
def test_every_supported_shape_of_a_per_head_mask(shape: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    full = torch.randn(1 if shape[0] in (1, H) else N, 1 if shape[1] == 1 else H, L, L)
    mask = full[:, KEPT] if len(KEPT) in (shape[1], shape[0] // N) and 1 not in shape else full
    mask = mask.reshape(shape)
    mha = dense_attention()
    slim, x = SlimAttention.from_dense(mha, KEPT), torch.randn(N, L, E)
    dense_mask = full.expand(N, H, L, L).reshape(N * H, L, L)
    expected = masked_attention(mha, KEPT)(x, x, x, attn_mask=dense_mask)[0]
    torch.testing.assert_close(slim(x, attn_mask=mask)[0], expected, atol=1e-5, rtol=1e-5)


def test_ambiguous_mask_shape_is_refused() -> None:
    mask = torch.zeros(6, L, L)  # six dense heads, or two images of three kept ones
    with pytest.raises(OptionError, match="can be 6 dense heads or 2 x 3 kept ones; give it with"):
        gather_heads(mask, batch=2, num_heads=6, kept_heads=(0, 1, 4))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(5, L, L), r"attn_mask has shape \(5, 5, 5\), expected 12"),
        (torch.zeros(3, 1, L, L), "expected two, three or four axes"),
        (torch.zeros(N, 5, L, L), "5 heads on its second axis, expected 6, 4 or 1"),
        (torch.zeros(L, L + 1), r"expected \[..., L, S\] with \(L, S\) = \(5, 5\)"),
        (torch.zeros(L, L, dtype=torch.int64), "must be bool or float, given torch.int64"),
    ],
)
def test_mask_of_unexpected_shape_or_type_is_refused(mask: Tensor, message: str) -> None:
    slim = SlimAttention.from_dense(dense_attention(), KEPT)
    with pytest.raises(OptionError, match=message):
        slim(torch.randn(N, L, E), attn_mask=mask)


def test_padding_mask_of_wrong_length_is_refused() -> None:
    slim = SlimAttention.from_dense(dense_attention(), KEPT)
    with pytest.raises(OptionError, match=r"key_padding_mask has shape \(2, 9\)"):
        slim(torch.randn(N, L, E), key_padding_mask=torch.zeros(N, 9))


@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched_input_is_refused(batch_first: bool) -> None:
    slim = SlimAttention.from_dense(dense_attention(batch_first), KEPT)
    order = r"\[N, L, E\]" if batch_first else r"\[L, N, E\]"
    with pytest.raises(OptionError, match=f"query has shape .*expected {order}.*add the batch"):
        slim(torch.randn(L, E))


def test_is_causal_without_mask_masks_later_keys() -> None:
    mha = dense_attention()
    slim, x = SlimAttention.from_dense(mha, KEPT), torch.randn(N, L, E)
    future = torch.ones(L, L).triu(1).bool()
    expected = masked_attention(mha, KEPT)(x, x, x, attn_mask=future)[0]
    torch.testing.assert_close(slim(x, is_causal=True)[0], expected, atol=1e-5, rtol=1e-5)


def test_replaces_open_clip_attention_with_its_calling_convention() -> None:
    from open_clip.transformer import Attention

    torch.manual_seed(0)
    dense = Attention(E, H).eval()
    nn.init.normal_(dense.in_proj_bias)
    slim = SlimAttention.from_dense(dense, KEPT)
    with torch.no_grad():
        for head in set(range(H)) - set(KEPT):
            dense.out_proj.weight[:, head * 8 : (head + 1) * 8] = 0.0
    x, mask = torch.randn(N, L, E), torch.randn(N * H, L, L)
    expected = dense(x, attn_mask=mask)
    torch.testing.assert_close(slim(x, attn_mask=mask), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(slim(x, mask), expected, atol=1e-5, rtol=1e-5)


def test_has_the_attributes_that_frameworks_read() -> None:
    slim = SlimAttention.from_dense(dense_attention(batch_first=False), KEPT)
    assert (slim.num_heads, slim.kept_heads, slim.head_dim, slim.embed_dim) == (H, KEPT, 8, E)
    assert slim.batch_first is False
    assert {name: tuple(p.shape) for name, p in slim.named_parameters()} == {
        "in_proj_weight": (96, E),
        "in_proj_bias": (96,),
        "out_proj.weight": (E, 32),
        "out_proj.bias": (E,),
    }
    assert "4 of 6 x 8" in repr(slim)


def test_works_inside_transformer_encoder_layer() -> None:
    """Avoid the fused path of the layer, which assumes square projections."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, H, 64, activation="gelu", batch_first=True).eval()
    masked = copy.deepcopy(layer)
    masked.self_attn = masked_attention(layer.self_attn, KEPT)
    layer.self_attn = SlimAttention.from_dense(layer.self_attn, KEPT)
    x = torch.randn(N, L, E)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), masked(x), atol=1e-5, rtol=1e-5)


def test_no_bias_and_explicit_head_width() -> None:
    assert SlimAttention.from_dense(dense_attention(bias=False), KEPT).in_proj_bias is None
    wide = SlimAttention(E, 5, (1, 4), head_dim=16)
    assert wide(torch.randn(N, L, E))[0].shape == (N, L, E)
    with pytest.raises(OptionError, match="embed_dim 48 is no multiple of num_heads 5"):
        SlimAttention(E, 5, (1, 4))


@pytest.mark.parametrize("kept", [(1, 1), (2, 1), (-1, 2), (0, H)])
def test_invalid_kept_heads_are_refused(kept: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match="kept_heads"):
        SlimAttention(E, H, kept)


@pytest.mark.parametrize("batch_first", [True, False])
def test_without_heads_the_output_is_the_bias(batch_first: bool) -> None:
    dense = dense_attention(batch_first)
    slim = SlimAttention.from_dense(dense, ())
    x = torch.randn(N, L, E)
    out, weights = slim(x, x, x, attn_mask=torch.zeros(L, L), need_weights=True)
    assert torch.equal(out, dense.out_proj.bias.expand(N, L, E))
    batch, tokens = (N, L) if batch_first else (L, N)
    assert torch.equal(weights, torch.zeros(batch, tokens, tokens))
    assert SlimAttention.from_dense(slim, ()).kept_heads == ()


def test_second_pruning_uses_dense_indices() -> None:
    mha = dense_attention()
    again = SlimAttention.from_dense(SlimAttention.from_dense(mha, KEPT), (2, 5))
    once = SlimAttention.from_dense(mha, (2, 5))
    assert again.kept_heads == (2, 5)
    for name, value in once.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    with pytest.raises(OptionError, match=r"kept_heads contains \[1\], which were removed before"):
        SlimAttention.from_dense(once, (1, 2))


@pytest.mark.parametrize("cut_before", [True, False])
def test_from_projections(cut_before: bool) -> None:
    mha = dense_attention()
    heads = KEPT if cut_before else tuple(range(H))
    rows = torch.cat([torch.arange(h * 8, h * 8 + 8) for h in heads])
    maps = []
    for weight, bias in zip(mha.in_proj_weight.chunk(3), mha.in_proj_bias.chunk(3), strict=True):
        linear = nn.Linear(E, len(rows))
        linear.weight.data, linear.bias.data = weight[rows].clone(), bias[rows].clone()
        maps.append(linear)
    out = nn.Linear(len(rows), E)
    out.weight.data, out.bias.data = mha.out_proj.weight[:, rows].clone(), mha.out_proj.bias
    slim = SlimAttention.from_projections(*maps, out, num_heads=H, kept_heads=KEPT, head_dim=8)
    expected = SlimAttention.from_dense(mha, KEPT).state_dict()
    assert all(torch.equal(slim.state_dict()[name], value) for name, value in expected.items())
    with pytest.raises(OptionError, match="expected all 2 or all 6 heads of width 4"):
        SlimAttention.from_projections(*maps, out, num_heads=H, kept_heads=(0, 1), head_dim=4)


class SeparateWeights(nn.Module):
    """CLIP's attention as in CAT-Seg, with separate weights."""

    def __init__(self, mha: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.out_proj, self.in_proj_bias = H, mha.out_proj, mha.in_proj_bias
        q, k, v = mha.in_proj_weight.chunk(3)
        self.q_proj_weight, self.k_proj_weight = nn.Parameter(q.clone()), nn.Parameter(k.clone())
        self.v_proj_weight = nn.Parameter(v.clone())

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> None: ...


def test_separate_weights_stay_separate() -> None:
    """CAT-Seg selects some of the three parameters by name for training."""
    mha = dense_attention()
    slim = SlimAttention.from_dense(SeparateWeights(mha), KEPT)
    expected = SlimAttention.from_dense(mha, KEPT)
    assert slim.call.returns_tuple and slim.in_proj_weight is None
    assert list(slim.state_dict()) == [
        "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias",
        "out_proj.weight", "out_proj.bias",
    ]  # fmt: skip
    parts = [slim.q_proj_weight, slim.k_proj_weight, slim.v_proj_weight]
    assert torch.equal(torch.cat(parts), expected.in_proj_weight)
    x, mask = torch.randn(N, L, E), torch.randn(N * H, L, L)
    for attn_mask in (None, mask):
        wanted = expected(x, attn_mask=attn_mask, need_weights=True)
        found = slim(x, attn_mask=attn_mask, need_weights=True)
        torch.testing.assert_close(found[0], wanted[0])
        torch.testing.assert_close(found[1], wanted[1])
    again = SlimAttention.from_dense(slim, KEPT[:1])
    assert again.in_proj_weight is None and again.kept_heads == KEPT[:1]
    once = SlimAttention.from_dense(SeparateWeights(mha), KEPT[:1])
    assert all(torch.equal(again.state_dict()[k], v) for k, v in once.state_dict().items())


def test_separate_weights_equal_fused_ones_and_may_be_empty() -> None:
    separate = SeparateWeights(dense_attention())
    slim = SlimAttention.from_dense(separate, KEPT)
    fused = SlimAttention.from_dense(dense_attention(), KEPT)
    x = torch.randn(N, L, E)
    torch.testing.assert_close(slim(x)[0], fused(x)[0])
    again = SlimAttention.from_dense(slim, KEPT)
    assert torch.equal(again(x)[0], slim(x)[0])
    none = SlimAttention.from_dense(separate, ())
    assert none.q_proj_weight.shape == (0, E)
    assert torch.equal(none(x)[0], separate.out_proj.bias.expand(N, L, E))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(3, 3), "Linear has no num_heads and no out_proj; expected nn.MultiheadAtt"),
        (nn.MultiheadAttention(E, H, add_bias_kv=True), "uses bias_k, bias_v, which a slim"),
        (nn.MultiheadAttention(E, H, add_zero_attn=True), "uses add_zero_attn"),
        (nn.MultiheadAttention(E, H, kdim=12, vdim=12), "q, k and v read different widths"),
    ],
)
def test_unsupported_attentions_are_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        SlimAttention.from_dense(module, KEPT)


def test_state_dict_deepcopy_and_half_precision() -> None:
    slim = SlimAttention.from_dense(dense_attention(), KEPT)
    other = SlimAttention(E, H, KEPT)
    other.load_state_dict(slim.state_dict(), strict=True)
    x = torch.randn(N, L, E)
    assert torch.equal(slim(x)[0], other.eval()(x)[0])
    assert torch.equal(slim(x)[0], copy.deepcopy(slim)(x)[0])
    mask = torch.randn(N * H, L, L)
    half = copy.deepcopy(slim).to(torch.bfloat16)(x.bfloat16(), attn_mask=mask)[0]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), slim(x, attn_mask=mask)[0], atol=0.1, rtol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = slim(x, attn_mask=mask)[0]
    torch.testing.assert_close(mixed.float(), slim(x, attn_mask=mask)[0], atol=0.1, rtol=0.1)


def test_dropout_only_in_training() -> None:
    mha = nn.MultiheadAttention(E, H, dropout=0.5, batch_first=True)
    slim = SlimAttention.from_dense(mha, KEPT)
    x = torch.randn(N, L, E)
    assert slim.training
    for need_weights in (True, False):
        first, second = (slim(x, need_weights=need_weights)[0] for _ in range(2))
        assert not torch.equal(first, second)
    slim.eval()
    assert torch.equal(slim(x)[0], slim(x)[0])


def test_gradients_reach_every_parameter() -> None:
    slim = SlimAttention.from_dense(dense_attention(), KEPT)
    slim(torch.randn(N, L, E), attn_mask=torch.randn(N * H, L, L))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in slim.parameters())
