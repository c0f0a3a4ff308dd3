from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers import Attention, AttentionRope
from timm.layers.pos_embed_rel import RelPosMlp
from timm.models.eva import EvaAttention
from timm.models.fastvit import Attention as MapAttention
from timm.models.swin_transformer import WindowAttention
from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn

from ovsprune.core.errors import OptionError, TargetError
from ovsprune.slim.modules import slim_attention
from ovsprune.slim.timm_attention import TimmAttention, is_timm_attention

WIDTH, HEADS, TOKENS = 24, 3, 10
KEPT = (0, 2)
NORM = nn.LayerNorm

FORMS: dict[str, Callable[[], nn.Module]] = {
    "fused": partial(Attention, WIDTH, HEADS, qkv_bias=True),
    "no bias": partial(Attention, WIDTH, HEADS),
    "norms": partial(
        Attention, WIDTH, HEADS, qkv_bias=True, qk_norm=True, scale_norm=True, norm_layer=NORM
    ),
    "wide": partial(Attention, WIDTH, HEADS, attn_head_dim=6, qkv_bias=True),
    "rope": partial(AttentionRope, WIDTH, HEADS),
    "rope, separate qkv": partial(AttentionRope, WIDTH, HEADS, qkv_fused=False, rotate_half=True),
    "biases as parameters": partial(EvaAttention, WIDTH, HEADS, scale_norm=False),
    "eva": partial(EvaAttention, WIDTH, HEADS, qkv_fused=False, norm_layer=NORM),
    "relative": partial(
        RelPosAttention, WIDTH, HEADS, rel_pos_cls=partial(RelPosMlp, window_size=(2, 5))
    ),
    "windows": partial(WindowAttention, WIDTH, HEADS, window_size=(2, 5)),
    "map": partial(MapAttention, WIDTH, WIDTH // HEADS, qkv_bias=True),
}


@pytest.fixture(params=FORMS)
def dense(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    module = FORMS[request.param]().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.requires_grad_(False)


def _inputs(dense: nn.Module) -> tuple[Tensor, dict[str, Any]]:
    x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    if isinstance(dense, MapAttention):
        return x.mT.unflatten(2, (2, 5)), {}
    if not isinstance(dense, (AttentionRope, EvaAttention)):
        return x, {}
    angle = torch.linspace(0, 3, 9).outer(torch.linspace(0.1, 1, 8))
    return x, {"rope": torch.cat([angle.sin(), angle.cos()], dim=-1)}


def _masked(dense: Any, kept: tuple[int, ...]) -> nn.Module:
    """Set the values of removed heads and their output columns to zero."""
    parts = TimmAttention(dense, separate_qkv=True)
    width = parts.head_dim
    for head in set(range(HEADS)) - set(kept):
        rows = slice(head * width, (head + 1) * width)
        parts.v_proj.weight[rows] = 0
        if parts.v_proj.bias is not None:
            parts.v_proj.bias[rows] = 0
        parts.proj.weight[:, rows] = 0
    return parts.to_dense()


def test_with_all_heads_equals_the_dense_module(dense: nn.Module) -> None:
    x, extra = _inputs(dense)
    assert is_timm_attention(dense)
    for separate in (False, True):
        slim = TimmAttention(dense, separate_qkv=separate)
        torch.testing.assert_close(slim(x, **extra), dense(x, **extra), atol=1e-6, rtol=1e-5)
        whole = slim.to_dense()
        assert type(whole) is type(dense)
        assert torch.equal(whole(x, **extra), dense(x, **extra))
        state = dense.state_dict()
        assert whole.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())


def test_kept_heads_equal_the_masked_dense_module(dense: nn.Module) -> None:
    x, extra = _inputs(dense)
    expected = _masked(dense, KEPT)(x, **extra)
    slim = slim_attention(dense, KEPT)
    scale = expected.std()
    assert (slim(x, **extra) - expected).abs().max() <= 1e-5 * scale
    assert slim.state_dict().keys() == dense.state_dict().keys()
    assert (slim.num_heads, slim.kept_heads) == (HEADS, KEPT)
    wrong = slim_attention(dense, (0, 1))
    assert (wrong(x, **extra) - expected).abs().max() > 0.1 * scale


def test_separate_layers_convert_back_to_the_dense_layout(dense: nn.Module) -> None:
    x, extra = _inputs(dense)
    once = TimmAttention(dense, KEPT)
    again = TimmAttention(TimmAttention(dense, KEPT, separate_qkv=True))
    assert once.state_dict().keys() == again.state_dict().keys()
    assert torch.equal(once(x, **extra), again(x, **extra))
    fewer = TimmAttention(once, (2,))
    assert torch.equal(fewer(x, **extra), TimmAttention(dense, (2,))(x, **extra))
    with pytest.raises(OptionError, match="only the heads .* are left"):
        TimmAttention(once, (1,))
    with pytest.raises(OptionError, match="only 2 of 3"):
        once.to_dense()


def test_masks_are_gathered_at_the_kept_heads(dense: nn.Module) -> None:
    if isinstance(dense, (RelPosAttention, WindowAttention, MapAttention)):
        pytest.skip("this class of timm takes no mask")
    x, extra = _inputs(dense)
    mask = torch.randn(1, HEADS, TOKENS, TOKENS)
    expected = _masked(dense, KEPT)(x, attn_mask=mask, **extra)
    found = slim_attention(dense, KEPT)(x, attn_mask=mask, **extra)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, slim_attention(dense, KEPT)(x, **extra), atol=1e-2)


def test_windows_have_masks_and_layers_get_one_entry_per_image() -> None:
    torch.manual_seed(0)
    dense = FORMS["windows"]().eval().requires_grad_(False)
    nn.init.normal_(dense.relative_position_bias_table)  # type: ignore[arg-type]
    x, mask = torch.randn(6, TOKENS, WIDTH), torch.randn(3, TOKENS, TOKENS)
    expected = dense(x, mask=mask)
    assert not torch.allclose(dense(x), expected, atol=1e-2)
    separate = TimmAttention(dense, separate_qkv=True, windows_per_image=3)
    seen = []
    for layer in (separate.k_proj, separate.proj):
        layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    for same in (TimmAttention(dense), separate, separate.to_dense()):
        torch.testing.assert_close(same(x, mask=mask), expected, atol=1e-6, rtol=1e-5)
    assert [part.shape[:2] for pair in seen for part in pair] == [(2, 3 * TOKENS)] * 4
    cut = _masked(dense, KEPT)(x, mask=mask)
    torch.testing.assert_close(slim_attention(dense, KEPT)(x, mask=mask), cut, atol=1e-5, rtol=1e-4)


def test_no_tensor_is_shared_with_the_dense_module(dense: nn.Module) -> None:
    """Loading weights into the slim module must not change the dense one."""
    x, extra = _inputs(dense)
    before = dense(x, **extra)
    slim = slim_attention(dense, KEPT)
    for parameter in slim.parameters():
        parameter.data.zero_()
    assert torch.equal(dense(x, **extra), before)
    separate = TimmAttention(dense, separate_qkv=True)
    for parameter in separate.parameters():
        parameter.data.add_(0.1)
    torch.testing.assert_close(
        separate.to_dense()(x, **extra), separate(x, **extra), atol=1e-5, rtol=1e-4
    )


def test_requires_grad_flags_are_kept(dense: nn.Module) -> None:
    dense.requires_grad_(True)
    name = next(n for n, _ in dense.named_parameters() if n.startswith("proj"))
    dense.get_parameter(name).requires_grad_(False)
    flags = {n: p.requires_grad for n, p in slim_attention(dense, KEPT).named_parameters()}
    assert flags == {n: p.requires_grad for n, p in dense.named_parameters()}


def test_unsupported_attentions_are_refused() -> None:
    with pytest.raises(TargetError, match="gate"):
        TimmAttention(Attention(WIDTH, HEADS, gated=True), KEPT)
    shared = AttentionRope(WIDTH, 4, qkv_fused=False, num_kv_heads=2)
    with pytest.raises(TargetError, match="shared by several heads"):
        TimmAttention(shared, KEPT)
    with pytest.raises(TargetError, match="no layers by timm's names"):
        TimmAttention(nn.MultiheadAttention(WIDTH, HEADS), KEPT)
