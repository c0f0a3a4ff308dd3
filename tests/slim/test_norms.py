from __future__ import annotations

import pytest
import torch
from torch import nn

from ovsprune.slim.modules import slim_module
from ovsprune.slim.norms import ZeroPaddedLayerNorm

KEPT = torch.tensor([1, 3, 4])


def _norm() -> nn.LayerNorm:
    norm = nn.LayerNorm(6, eps=1e-3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def test_equals_the_dense_norm_of_zero_padded_input() -> None:
    norm, x = _norm(), torch.randn(4, 5, 3)
    slim = slim_module(norm, {"out": KEPT})
    assert isinstance(slim, ZeroPaddedLayerNorm) and slim.dense_width == 6
    padded = torch.zeros(4, 5, 6).index_copy(2, KEPT, x)
    torch.testing.assert_close(slim(x), norm(padded)[..., KEPT])
    other = nn.functional.layer_norm(x, (3,), norm.weight[KEPT], norm.bias[KEPT], norm.eps)
    assert (slim(x) - other).abs().max() > 0.1


def test_pruning_twice_equals_pruning_once() -> None:
    norm, x = _norm(), torch.randn(4, 2)
    twice = slim_module(slim_module(norm, {"out": KEPT}), {"out": torch.tensor([0, 2])})
    once = slim_module(norm, {"out": KEPT[[0, 2]]})
    assert torch.equal(twice(x), once(x)) and twice.dense_width == 6


def test_without_removed_channels_equals_layer_norm() -> None:
    norm, x = _norm(), torch.randn(4, 6)
    counted = ZeroPaddedLayerNorm(norm)
    assert torch.equal(counted(x), norm(x))
    assert counted.weight is norm.weight and set(counted.state_dict()) == set(norm.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    norm = _norm()
    slim = slim_module(norm, {"out": KEPT})
    x = 300 + torch.randn(4, 3)  # squares overflow float16
    half = slim_module(norm.to(dtype), {"out": KEPT})(x.to(dtype))
    assert half.dtype == dtype
    torch.testing.assert_close(half.float(), slim.float()(x), atol=0.05, rtol=0.02)
