"""Attention with separate projections equals the module that it replaces."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ovsprune.graph.attention import SeparateAttention
from ovsprune.slim import SlimAttention
from ovsprune.slim.calls import X_MASK


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_equal_those_of_torchs_attention(batch_first: bool, bias: bool) -> None:
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(48, 3, bias=bias, batch_first=batch_first).eval()
    if bias:
        nn.init.normal_(dense.in_proj_bias)
        nn.init.normal_(dense.out_proj.bias)
    x = torch.randn(4, 9, 48)
    mask = torch.randn(9, 9) if batch_first else torch.randn(4, 4)
    separate = SeparateAttention(dense)
    for attn_mask in (None, mask):
        expected = dense(x, x, x, need_weights=False, attn_mask=attn_mask)[0]
        torch.testing.assert_close(separate(x, x, x, attn_mask=attn_mask)[0], expected)


def test_the_weights_are_copies() -> None:
    dense = nn.MultiheadAttention(16, 2)
    before = dense.in_proj_weight.clone()
    with torch.no_grad():
        SeparateAttention(dense).q_proj.weight.zero_()
    assert torch.equal(dense.in_proj_weight, before)


@pytest.mark.parametrize("options", [{"kdim": 8}, {"add_bias_kv": True}])
def test_other_forms_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="only self-attention with one width"):
        SeparateAttention(nn.MultiheadAttention(16, 2, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("batch_first", [True, False])
def test_slim_attention_can_be_rewritten_and_cut_again(batch_first: bool) -> None:
    """After a second cut, ``kept_heads`` still refers to the heads of the dense module."""
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(48, 4, batch_first=batch_first).eval()
    nn.init.normal_(dense.in_proj_bias)
    slim = SlimAttention.from_dense(dense, [0, 2, 3])
    separate = SeparateAttention(slim)
    assert (separate.num_heads, separate.kept_heads) == (4, (0, 2, 3))
    x = torch.randn(4, 9, 48)
    torch.testing.assert_close(separate(x, x, x)[0], slim(x, x, x)[0])
    again = separate.finished()
    assert isinstance(again, SlimAttention) and again.kept_heads == (0, 2, 3)
    state = slim.state_dict()
    assert all(torch.equal(state[k], v) for k, v in again.state_dict().items())
    for layer in (separate.q_proj, separate.k_proj, separate.v_proj):
        layer.weight, layer.bias = (nn.Parameter(t[12:]) for t in (layer.weight, layer.bias))
    separate.out_proj.weight = nn.Parameter(separate.out_proj.weight[:, 12:])
    less = separate.finished(torch.tensor([1, 2]))
    assert isinstance(less, SlimAttention) and less.kept_heads == (2, 3)
    once = SlimAttention.from_dense(dense, [2, 3])
    assert all(torch.equal(v, less.state_dict()[k]) for k, v in once.state_dict().items())
    assert less.batch_first is batch_first


def test_slim_attention_that_returns_no_tuple_is_refused() -> None:
    slim = SlimAttention(16, 2, [1], call=X_MASK)
    with pytest.raises(ValueError, match="returns no tuple"):
        SeparateAttention(slim)
