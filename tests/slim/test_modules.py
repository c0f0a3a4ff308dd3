from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from ovsprune.core.errors import OptionError, TargetError
from ovsprune.slim.modules import slim_attention, slim_module

ROWS, COLUMNS = torch.tensor([1, 3, 4]), torch.tensor([0, 2])


def test_linear_layer_keeps_rows_and_columns_without_changing_the_original() -> None:
    linear = nn.Linear(4, 6).eval()
    linear.weight.requires_grad_(False)
    before = [p.clone() for p in linear.parameters()]
    slim = slim_module(linear, {"out": ROWS, "in": COLUMNS})
    assert (slim.in_features, slim.out_features, slim.training) == (2, 3, False)
    assert torch.equal(slim.weight, linear.weight[ROWS][:, COLUMNS])
    assert torch.equal(slim.bias, linear.bias[ROWS])
    assert not slim.weight.requires_grad and slim.bias.requires_grad
    assert slim(torch.randn(5, 2)).shape == (5, 3)
    with torch.no_grad():
        for parameter in slim_module(linear, {"in": COLUMNS}).parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(linear.parameters(), before, strict=True))
    assert (linear.in_features, linear.out_features) == (4, 6)


def test_no_index_gives_a_copy_with_own_tensors() -> None:
    linear = nn.Linear(4, 6, bias=False)
    slim = slim_module(linear, {})
    assert torch.equal(slim.weight, linear.weight) and slim.weight is not linear.weight
    assert slim.bias is None


def test_convolution_and_batch_norm_equal_the_dense_pair_on_kept_channels() -> None:
    conv, norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6).eval()
    norm.running_mean.normal_()
    images = torch.randn(1, 2, 5, 5)
    expected = norm(conv(torch.zeros(1, 4, 5, 5).index_copy(1, COLUMNS, images)))[:, ROWS]
    slim_conv, slim_norm = (
        slim_module(conv, {"out": ROWS, "in": COLUMNS}),
        slim_module(norm, {"out": ROWS}),
    )
    out = slim_norm(slim_conv(images))
    torch.testing.assert_close(out, expected)
    assert (slim_conv.out_channels, slim_norm.num_features) == (3, 3)


def test_layer_norm_has_the_kept_width() -> None:
    slim = slim_module(nn.LayerNorm(6), {"out": ROWS})
    assert slim.normalized_shape == (3,)
    assert slim(torch.randn(2, 3)).shape == (2, 3)


def test_slim_attention_keeps_hooks_and_requires_grad() -> None:
    mha = nn.MultiheadAttention(12, 3, batch_first=True)
    mha.in_proj_weight.requires_grad_(False)
    calls: list[str] = []
    handle = mha.register_forward_hook(lambda *_: calls.append("called"))
    slim = slim_attention(mha, torch.tensor([0, 2]))
    slim(torch.randn(1, 2, 12))
    handle.remove()
    slim(torch.randn(1, 2, 12))
    assert calls == ["called"]
    assert not slim.in_proj_weight.requires_grad and slim.out_proj.weight.requires_grad
    with pytest.raises(OptionError, match="strictly ascending"):
        slim_attention(mha, [2, 0])


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Identity(), "Identity has no parameter named weight.*first remove its wrapper"),
        (parametrizations.spectral_norm(nn.Linear(4, 6)), "has no parameter named weight"),
        (nn.Conv2d(4, 4, 3, groups=2), "Conv2d has 2 groups of several channels"),
        (
            nn.Linear(4, 3),
            r"Linear has a weight of shape \(3, 4\), too small for index 4 on axis 0",
        ),
    ],
)
def test_unsupported_modules_are_refused(module: nn.Module, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        slim_module(module, {"out": ROWS})
