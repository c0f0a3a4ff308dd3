"""Inputs and outputs as rows: every layer is a linear map of its input rows."""

from __future__ import annotations

import pytest
import torch
from timm.layers import create_conv2d
from torch import nn

from ovsprune.graph.layers import is_channelwise
from ovsprune.graph.rows import flat_columns, input_rows, output_rows, reads_all_channels

LAYERS = {
    "matrix": (nn.Linear(6, 5), (2, 7, 6)),
    "1x1": (nn.Conv2d(6, 5, 1), (2, 6, 4, 3)),
    "1x1, strided": (nn.Conv2d(6, 5, 1, stride=2, bias=False), (2, 6, 5, 4)),
    "1x1, padded": (nn.Conv2d(6, 5, 1, padding=1), (2, 6, 5, 4)),
    "3x3": (nn.Conv2d(6, 5, 3, padding=1), (2, 6, 5, 4)),
    "3x2, strided and dilated": (nn.Conv2d(6, 5, (3, 2), (2, 1), dilation=2), (2, 6, 9, 8)),
    "3x3, reflected": (nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect"), (2, 6, 5, 4)),
    "3x3, padded as TensorFlow": (create_conv2d(6, 5, 3, stride=2, padding="same"), (2, 6, 7, 6)),
    "one axis": (nn.Conv1d(6, 5, 3, padding="same"), (2, 6, 7)),
}


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_layer_is_a_linear_map_of_its_rows(name: str) -> None:
    layer, shape = LAYERS[name]
    read = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = input_rows(layer, read)
    given = rows @ layer.weight.flatten(1).T + (0 if layer.bias is None else layer.bias)
    torch.testing.assert_close(given, output_rows(layer, layer(read)), atol=1e-5, rtol=1e-5)
    assert rows.shape[-1] == layer.weight[0].numel()


def test_input_rows_do_not_modify_the_layer() -> None:
    layer = nn.Conv2d(4, 3, 3)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    before = repr(layer), {k: v.clone() for k, v in layer.state_dict().items()}
    input_rows(layer, torch.randn(1, 4, 5, 5))
    assert repr(layer) == before[0] and not calls
    assert all(torch.equal(v, before[1][k]) for k, v in layer.state_dict().items())


def test_flat_columns_of_input_channels() -> None:
    units = torch.tensor([[0, 1], [3, 2]])
    assert torch.equal(flat_columns(nn.Linear(4, 2), units), units)
    assert torch.equal(flat_columns(nn.Conv2d(4, 2, 1), units), units)
    taps = flat_columns(nn.Conv2d(4, 2, (1, 3)), units)
    assert taps.tolist() == [[0, 1, 2, 3, 4, 5], [9, 10, 11, 6, 7, 8]]
    layer = nn.Conv2d(4, 2, (1, 3))
    masked = layer.weight.detach().flatten(1).clone()
    masked[:, taps[1]] = 0
    assert not masked.view_as(layer.weight)[:, 2:].any()
    assert masked.view_as(layer.weight)[:, :2].all()


@pytest.mark.parametrize(
    ("layer", "all_channels", "channelwise"),
    [
        (nn.Linear(4, 4), True, False),
        (nn.Conv2d(4, 4, 3), True, False),
        (nn.Conv2d(4, 4, 3, groups=4), False, True),
        (nn.Conv2d(4, 4, 3, groups=2), False, False),
        (nn.Conv2d(4, 8, 3, groups=4), False, False),
        (nn.BatchNorm2d(4), True, True),
        (nn.Conv2d(1, 4, 3), True, False),
    ],
)
def test_channels_that_an_output_reads(
    layer: nn.Module, all_channels: bool, channelwise: bool
) -> None:
    assert (reads_all_channels(layer), is_channelwise(layer)) == (all_channels, channelwise)
