"""Separate attention equals the module that it replaces."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ovsprune.graph.attention import SeparateAttention


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_it_equals_torchs_attention(batch_first: bool, bias: bool) -> None:
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(48, 3, bias=bias, batch_first=batch_first).eval()
    if bias:
        nn.init.normal_(dense.in_proj_bias)
        nn.init.normal_(dense.out_proj.bias)
    x = torch.randn(4, 9, 48)
    mask = torch.randn(9, 9) if batch_first else torch.randn(4, 4)
    separate = SeparateAttention(dense)
    for given in (None, mask):
        expected = dense(x, x, x, need_weights=False, attn_mask=given)[0]
        torch.testing.assert_close(separate(x, x, x, attn_mask=given)[0], expected)


def test_the_dense_module_keeps_its_weights() -> None:
    dense = nn.MultiheadAttention(16, 2)
    before = dense.in_proj_weight.clone()
    with torch.no_grad():
        SeparateAttention(dense).q_proj.weight.zero_()
    assert torch.equal(dense.in_proj_weight, before)


@pytest.mark.parametrize("options", [{"kdim": 8}, {"add_bias_kv": True}])
def test_other_forms_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="only self-attention with one width"):
        SeparateAttention(nn.MultiheadAttention(16, 2, **options))  # type: ignore[arg-type]
