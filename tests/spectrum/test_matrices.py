"""Weight matrices of a model, and their spectral metrics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ovsprune.core.errors import OptionError, UnknownNameError, WeightsError
from ovsprune.slim.attention import SlimAttention
from ovsprune.spectrum import FITS, eigenvalues, matrices, spectra


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)


def named(model: nn.Module) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    return {m.name: (m.parameter, m.kind, tuple(m.weight.shape)) for m in matrices(model)}


def test_queries_keys_values_and_output_projection_are_separate() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "fused": Fused()})
    assert named(model) == {
        "attn.q": ("attn.in_proj_weight", "q", (8, 8)),
        "attn.k": ("attn.in_proj_weight", "k", (8, 8)),
        "attn.v": ("attn.in_proj_weight", "v", (8, 8)),
        "attn.out_proj": ("attn.out_proj.weight", "out", (8, 8)),
        "fused.q": ("fused.qkv.weight", "q", (8, 8)),
        "fused.k": ("fused.qkv.weight", "k", (8, 8)),
        "fused.v": ("fused.qkv.weight", "v", (8, 8)),
        "fused.proj": ("fused.proj.weight", "out", (8, 8)),
    }
    parts = [m.weight for m in matrices(model) if m.parameter == "attn.in_proj_weight"]
    assert torch.equal(torch.cat(parts), model["attn"].in_proj_weight)


def test_slim_attention_with_fused_and_separate_weights() -> None:
    slim = SlimAttention(16, 4, (0, 2, 3))
    assert [m.weight.shape[0] for m in matrices(slim)] == [12, 12, 12, 16]
    apart = SlimAttention(16, 4, (0, 2), separate_qkv=True)
    assert list(named(apart)) == ["q", "k", "v", "out_proj"]
    assert named(apart)["k"][0] == "k_proj_weight"
    nothing = SlimAttention(16, 4, ())
    assert list(named(nothing)) == []  # without any head there is no matrix


def test_parameters_that_are_no_matrices_are_excluded() -> None:
    model = nn.Sequential(
        nn.Embedding(5, 8), nn.LayerNorm(8), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 3)
    )
    assert named(model) == {"3": ("3.weight", "Conv2d", (4, 8, 3, 3))}


def test_a_shared_weight_is_listed_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)})
    model["b"].weight = model["a"].weight
    assert list(named(model)) == ["a"]


def test_a_shared_fused_weight_is_listed_once() -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.MultiheadAttention(8, 2)})
    model["b"].in_proj_weight = model["a"].in_proj_weight
    assert list(named(model)) == ["a.q", "a.k", "a.v", "a.out_proj", "b.out_proj"]


def test_fused_keys_and_values_of_equal_width_are_separate() -> None:
    pool = nn.ModuleDict({"q": nn.Linear(8, 8), "kv": nn.Linear(8, 16), "proj": nn.Linear(8, 8)})
    assert list(named(pool)) == ["q", "k", "v", "proj"]
    assert named(pool)["v"] == ("kv.weight", "v", (8, 8))
    shared = nn.ModuleDict({"qkv": nn.Linear(8, 16), "proj": nn.Linear(8, 8)})
    assert list(named(shared)) == ["qkv", "proj"]  # fewer heads of keys: no thirds
    shared = nn.ModuleDict({"qkv": nn.Linear(48, 96), "proj": nn.Linear(48, 48)})
    assert named(shared)["qkv"] == ("qkv.weight", "qkv", (96, 48))
    for out in ({"out_proj": nn.Linear(48, 48)}, {"proj": nn.Conv2d(48, 48, 1)}):
        assert "qkv" in named(nn.ModuleDict({"qkv": nn.Linear(48, 96), **out}))


def test_a_projection_interleaved_by_heads_is_not_split() -> None:
    attention = pytest.importorskip("timm.layers").Attention2d(8, num_heads=2, head_first=True)
    assert "qkv" in named(attention) and "q" not in named(attention)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(WeightsError, match=r"0\.weight has values that are not finite"):
        spectra(matrices(model))


def test_kinds_are_names_in_a_block() -> None:
    model = nn.ModuleDict(
        {"layer1": nn.Sequential(nn.ModuleDict({"downsample": nn.Sequential(nn.Linear(4, 4))}))}
    )
    assert [m.kind for m in matrices(model)] == ["downsample"]


def test_batches_do_not_change_the_metrics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.Linear(20, 30), nn.Linear(20, 30), nn.Linear(30, 20)
    )
    found = matrices(model)
    measured = spectra(found, fit="least-ks")
    assert [one.name for one in measured] == [one.name for one in found]
    for matrix, one in zip(found, measured, strict=True):
        values = eigenvalues(matrix.weight)
        law = FITS["least-ks"](values)
        assert (one.alpha, one.xmin, one.ks_distance, one.n_tail) == pytest.approx(
            (law.alpha, law.xmin, law.ks_distance, law.n_tail), rel=1e-9
        )
        assert one.n_eigenvalues == len(values)
        assert one.alpha_hat == pytest.approx(law.alpha * math.log10(float(values[-1])))
    linear = model[1].weight.detach().double()
    norm = torch.linalg.matrix_norm(linear, 2)
    assert measured[1].spectral_norm == pytest.approx(float(norm))
    assert measured[1].stable_rank == pytest.approx(float(linear.square().sum() / norm**2))


def test_an_unfolded_convolution_is_one_matrix() -> None:
    torch.manual_seed(0)
    found = matrices(nn.Conv2d(4, 12, 3))
    weight = found[0].weight.detach().double().flatten(1)
    (one,) = spectra(found, convolution="unfolded")
    expected = torch.linalg.svdvals(weight).square().flip(0)
    torch.testing.assert_close(one.eigenvalues, expected)
    assert spectra(found)[0].n_eigenvalues == 4 * 9


def test_a_weight_without_a_tail_has_an_infinite_alpha() -> None:
    layer = nn.Linear(6, 5)
    nn.init.zeros_(layer.weight)
    (one,) = spectra(matrices(layer))
    assert one.alpha == math.inf and one.n_eigenvalues == 0 and one.stable_rank == 0
    with torch.no_grad():
        layer.weight.copy_(torch.outer(torch.arange(1.0, 6), torch.arange(1.0, 7)))
    (one,) = spectra(matrices(layer))
    assert one.alpha == math.inf and one.n_eigenvalues == 1
    assert one.stable_rank == pytest.approx(1.0)


def test_unknown_options_are_refused() -> None:
    found = matrices(nn.Linear(4, 4))
    with pytest.raises(UnknownNameError, match="unknown fit 'hil'. Did you mean 'hill'"):
        spectra(found, fit="hil")
    with pytest.raises(OptionError, match="convolution is 'fft', expected slices or unfolded"):
        spectra(found, convolution="fft")
    with pytest.raises(ValueError, match="convolution is 'fft'"):
        eigenvalues(torch.ones(4, 4), "fft")
