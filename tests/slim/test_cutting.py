from __future__ import annotations

import doctest
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ovsprune.core.errors import CheckpointError
from ovsprune.slim.cutting import Run, cut_state, fuse_qkv, keep_index

ATTN = "transformer.resblocks.0.attn"


def split(state: dict[str, Tensor], form: str) -> dict[str, Tensor]:
    """Separate queries, keys and values, with the names of transformers or torch."""
    result = {}
    for name, tensor in state.items():
        if "in_proj_" not in name:
            result[name] = tensor
            continue
        if form == "torch" and name.endswith("in_proj_bias"):
            result[name] = tensor
            continue
        stem, what = name.rsplit(".in_proj_", 1)
        for which, part in zip("qkv", tensor.chunk(3), strict=True):
            mark = "_" if form == "torch" else "."
            result[f"{stem}.{which}_proj{mark}{what}"] = part
    return result


@pytest.mark.parametrize("module", ["cutting", "apply"])
def test_examples_in_docstrings(module: str) -> None:
    done = doctest.testmod(importlib.import_module(f"ovsprune.slim.{module}"))
    assert done.attempted and not done.failed


def test_keep_index_of_runs_on_one_axis() -> None:
    runs = [
        Run(0, 2, 2, torch.tensor([1]), "a"),  # 2 3
        Run(4, 3, 1, torch.tensor([0, 2]), "b"),  # 4 6
    ]
    assert keep_index(8, runs).tolist() == [2, 3, 4, 6, 7]
    with pytest.raises(CheckpointError, match="b has 3 units of width 1 from index 4 on"):
        keep_index(6, runs)


def test_cut_state_takes_the_kept_rows_and_columns(
    make_tower: Callable[..., nn.Module], slim_spec: Any
) -> None:
    state = make_tower().state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    spec, mask = slim_spec(state)
    cut = cut_state(state, spec, mask)
    assert list(cut) == list(state)
    rows = torch.cat([torch.arange(12), torch.arange(24, 36)])  # heads 0 and 2 of width 12
    three = torch.cat([rows, 48 + rows, 96 + rows])
    assert torch.equal(cut[f"{ATTN}.in_proj_weight"], before[f"{ATTN}.in_proj_weight"][three])
    assert torch.equal(cut[f"{ATTN}.in_proj_bias"], before[f"{ATTN}.in_proj_bias"][three])
    out = f"{ATTN}.out_proj.weight"
    assert torch.equal(cut[out], before[out][:, rows])
    assert torch.equal(cut[f"{ATTN}.out_proj.bias"], before[f"{ATTN}.out_proj.bias"])
    mlp, units = "transformer.resblocks.1.mlp", mask["transformer.resblocks.1.mlp"]
    assert torch.equal(cut[f"{mlp}.c_fc.weight"], before[f"{mlp}.c_fc.weight"][units])
    assert torch.equal(cut[f"{mlp}.c_fc.bias"], before[f"{mlp}.c_fc.bias"][units])
    assert torch.equal(cut[f"{mlp}.c_proj.weight"], before[f"{mlp}.c_proj.weight"][:, units])
    whole = "transformer.resblocks.2.attn.in_proj_weight"
    assert cut[whole] is state[whole]
    assert all(torch.equal(state[name], before[name]) for name in state)


@pytest.mark.parametrize("form", ["transformers", "torch"])
def test_separate_projections_stay_separate(
    make_tower: Callable[..., nn.Module], slim_spec: Any, form: str
) -> None:
    state = make_tower().state_dict()
    spec, mask = slim_spec(state)
    apart = split(state, form)
    cut = cut_state(apart, spec, mask)
    assert list(cut) == list(apart)
    fused = fuse_qkv(cut)
    if form == "torch":
        assert fused.keys() == state.keys()
    expected = cut_state(state, spec, mask)
    assert fused.keys() == expected.keys()
    assert all(torch.equal(fused[name], expected[name]) for name in expected)


def test_incomplete_projections_are_not_fused() -> None:
    two = {"a.q_proj.weight": torch.ones(1), "a.k_proj.weight": torch.ones(1)}
    assert fuse_qkv(two).keys() == two.keys()


def test_channels_of_a_convolution_and_its_norm(
    make_tower: Callable[..., nn.Module], slim_spec: Any
) -> None:
    from dataclasses import replace

    from ovsprune.slim.spec import LayerSpec, SliceSpec

    spec, _ = slim_spec(make_tower().state_dict())
    slices = (SliceSpec("conv1", "out"), SliceSpec("bn1", "out"), SliceSpec("conv2", "in", 2))
    spec = replace(spec, layers=(LayerSpec("b.conv1", "channels", "b", 3, 2, 2, slices),))
    state = {
        "conv1.weight": torch.arange(6.0).reshape(6, 1, 1, 1),
        "bn1.weight": torch.arange(6.0),
        "bn1.bias": torch.arange(6.0),
        "bn1.running_mean": torch.arange(6.0),
        "bn1.running_var": torch.arange(6.0),
        "bn1.num_batches_tracked": torch.tensor(3),
        "conv2.weight": torch.arange(9.0).reshape(1, 9, 1, 1),
        "conv2.bias": torch.zeros(1),
    }
    cut = cut_state(state, spec, {"b.conv1": torch.tensor([0, 2])})
    for name in ("conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var"):
        assert cut[name].flatten().tolist() == [0, 1, 4, 5], name
    assert cut["conv2.weight"].flatten().tolist() == [0, 1, 2, 3, 6, 7, 8]
    assert cut["bn1.num_batches_tracked"] == 3 and cut["conv2.bias"].shape == (1,)


def test_heads_with_slices_are_cut_by_slices(
    make_tower: Callable[..., nn.Module], slim_spec: Any
) -> None:
    from dataclasses import replace

    from ovsprune.slim.spec import LayerSpec, SliceSpec

    spec, _ = slim_spec(make_tower().state_dict())
    slices = (SliceSpec("a.query", "out"), SliceSpec("a.dense", "in"))
    spec = replace(spec, layers=(LayerSpec("a", "heads", "b", 3, 2, 2, slices),))
    state = {
        "a.query.weight": torch.arange(6.0).reshape(6, 1),
        "a.query.bias": torch.arange(6.0),
        "a.dense.weight": torch.arange(6.0).reshape(1, 6),
        "a.dense.bias": torch.zeros(1),
    }
    cut = cut_state(state, spec, {"a": torch.tensor([0, 2])})
    for name in ("a.query.weight", "a.query.bias", "a.dense.weight"):
        assert cut[name].flatten().tolist() == [0, 1, 4, 5], name
    assert cut["a.dense.bias"].shape == (1,)


Change = Callable[[dict[str, Tensor]], Any]
FC = "transformer.resblocks.0.mlp.c_fc.weight"
BAD: dict[str, tuple[Change, str]] = {
    "no MLP": (lambda s: s.pop(FC), f"{FC} is missing; expected a dense tower"),
    "no attention": (lambda s: s.pop(f"{ATTN}.out_proj.weight"), f"{ATTN} has no out_proj.weight"),
    "narrow": (lambda s: s.update({FC: s[FC][:50]}), "needs 96 channels, but there are 50; these"),
    "other heads": (
        lambda s: s.update({f"{ATTN}.in_proj_weight": torch.zeros(96, 48)}),
        "has 96 channels on axis 0, expected 144 for 4 heads of width 12",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_weights_of_another_model_are_refused(
    make_tower: Callable[..., nn.Module], slim_spec: Any, name: str
) -> None:
    change, message = BAD[name]
    state = dict(make_tower().state_dict())
    spec, mask = slim_spec(state)
    change(state)
    with pytest.raises(CheckpointError, match=message):
        cut_state(state, spec, mask)
