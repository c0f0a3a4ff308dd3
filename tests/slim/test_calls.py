from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsprune.slim.attention import SlimAttention
from ovsprune.slim.calls import OPEN_CLIP_CALL, OPEN_CLIP_KV_CALL, TORCH_CALL, call_convention
from ovsprune.slim.dense import is_batch_first
from tests.environments.stand_in import HeadAttention

N, L, S, E, H = 2, 5, 7, 48, 6
KEPT = (0, 2, 3, 5)


def torch_attention(batch_first: bool = True) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(E, H, batch_first=batch_first).eval()
    for parameter in mha.parameters():
        nn.init.normal_(parameter, std=0.3)
    return mha


def heads_masked(dense: Any) -> Any:
    masked = copy.deepcopy(dense)
    with torch.no_grad():
        for head in set(range(H)) - set(KEPT):
            masked.out_proj.weight[:, head * 8 : (head + 1) * 8] = 0.0
    return masked


class SequenceAttention(nn.Module):
    """open_clip's class up to 2.24: (x, attn_mask), [L, N, E], without ``batch_first``."""

    def __init__(self, mha: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.out_proj = mha.num_heads, mha.out_proj
        self.in_proj_weight, self.in_proj_bias = mha.in_proj_weight, mha.in_proj_bias
        self.attn_drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        flat = F.linear(x.transpose(0, 1), self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in flat)
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        weights = (logits if attn_mask is None else logits + attn_mask).softmax(-1)
        out: Tensor = self.out_proj((self.attn_drop(weights) @ v).transpose(1, 2).flatten(2))
        return out.transpose(0, 1)


class PassingOn(nn.MultiheadAttention):
    """Subclass as in CAT-Seg, whose forward passes its arguments to the parent class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_forward_without_named_arguments_uses_the_parent_class() -> None:
    assert call_convention(PassingOn(E, H)) is TORCH_CALL
    slim = SlimAttention.from_dense(PassingOn(E, H, batch_first=True), KEPT)
    x = torch.randn(N, L, E)
    out, weights = slim(x, x, x, need_weights=False)
    assert out.shape == x.shape and weights is None


def head_masks() -> dict[str, Tensor | None]:
    torch.manual_seed(1)
    true_attends = (torch.rand(L, L) > 0.5) | torch.eye(L).bool()
    return {
        "none": None,
        "2-D": torch.randn(L, L),
        "a row a head": 3 * torch.randn(N * H, L, L),
        "bool": true_attends,
        "bool, a row a head": (torch.rand(N * H, L, L) > 0.5) | torch.eye(L).bool(),
    }


@pytest.mark.parametrize("form", head_masks())
def test_main_branch_attention_of_open_clip_keeps_its_calling_convention(form: str) -> None:
    dense, mask = HeadAttention(torch_attention()), head_masks()[form]
    slim = SlimAttention.from_dense(dense, KEPT)
    x = torch.randn(N, L, E)
    expected = heads_masked(dense)(x, attn_mask=mask)
    for found in (slim(x, k_x=x, v_x=x, attn_mask=mask), slim(x, None, None, mask)):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_bool_mask_of_the_main_branch_is_inverted() -> None:
    x, mask = torch.randn(N, L, E), torch.ones(L, L).tril().bool()
    head = SlimAttention.from_dense(HeadAttention(torch_attention()), KEPT)
    own = SlimAttention.from_dense(torch_attention(), KEPT)
    torch.testing.assert_close(head(x, attn_mask=mask), own(x, attn_mask=~mask)[0])
    assert not torch.allclose(head(x, attn_mask=mask), own(x, attn_mask=mask.T)[0], atol=1e-2)


def test_cross_attention_of_the_main_branch() -> None:
    dense = HeadAttention(torch_attention())
    slim, masked = SlimAttention.from_dense(dense, KEPT), heads_masked(dense)
    x, memory, other = torch.randn(N, L, E), torch.randn(N, S, E), torch.randn(N, L, E)
    cases: list[dict[str, Tensor]] = [
        {"k_x": memory, "v_x": memory, "attn_mask": torch.randn(L, S)},
        {"k_x": other},
        {"v_x": other},
    ]
    for given in cases:
        expected = masked(x, **given)
        torch.testing.assert_close(slim(x, **given), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(slim(x, k_x=other), slim(x, v_x=other), atol=1e-2)


def test_undeclared_axis_order_is_detected_by_a_forward_pass() -> None:
    dense = SequenceAttention(torch_attention()).train()
    slim = SlimAttention.from_dense(dense, KEPT).eval()
    assert (slim.batch_first, slim.call) == (False, OPEN_CLIP_CALL)
    x, mask = torch.randn(L, N, E), torch.randn(L, L)
    expected = heads_masked(dense).eval()(x, mask)
    torch.testing.assert_close(slim(x, mask), expected, atol=1e-5, rtol=1e-5)


def test_axis_order_of_every_supported_class() -> None:
    assert is_batch_first(torch_attention()) and not is_batch_first(
        torch_attention(batch_first=False)
    )
    assert is_batch_first(HeadAttention(torch_attention()))
    assert not is_batch_first(SequenceAttention(torch_attention()).half())
    sequence = SequenceAttention(torch_attention())
    sequence.batch_first = True  # type: ignore[assignment]
    assert is_batch_first(sequence)


def test_calling_convention_of_every_supported_class() -> None:
    from open_clip.transformer import Attention

    assert call_convention(torch_attention()) is TORCH_CALL
    assert call_convention(Attention(E, H)) is OPEN_CLIP_CALL
    assert call_convention(HeadAttention(torch_attention())) is OPEN_CLIP_KV_CALL
    slim = SlimAttention.from_dense(HeadAttention(torch_attention()), KEPT)
    again = SlimAttention.from_dense(copy.deepcopy(slim), (2, 5))
    assert slim.call == again.call == OPEN_CLIP_KV_CALL


def test_surplus_and_repeated_arguments_are_refused() -> None:
    x = torch.randn(N, L, E)
    with pytest.raises(
        TypeError, match="got 3 positional arguments, expected at most 2: query, attn_mask"
    ):
        SlimAttention(E, H, KEPT, call=OPEN_CLIP_CALL)(x, None, None)
    with pytest.raises(TypeError, match="got the argument k_x twice"):
        SlimAttention(E, H, KEPT, call=OPEN_CLIP_KV_CALL)(x, x, k_x=x)
