"""Directions inside heads in the slim checkpoint: bases, widths, and files that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ovsprune.core.errors import CheckpointError, OptionError
from ovsprune.slim.apply import apply
from ovsprune.slim.attention import SlimAttention
from ovsprune.slim.directions import dual, scaled, turned
from ovsprune.slim.load import load
from ovsprune.slim.read import SlimCheckpoint, read
from ovsprune.slim.spec import LayerSpec, SlimSpec, schema, version_of
from ovsprune.slim.write import write
from tests.slim.conftest import HEADS, WIDTH
from tests.slim.test_read import relist

D = WIDTH // HEADS
ATTENTION = "transformer.resblocks.1.attn"


def bases(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {kind: torch.randn(HEADS, D, D, generator=generator) for kind in ("qk", "vo")}


@pytest.fixture
def mha() -> nn.MultiheadAttention:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    nn.init.normal_(attention.in_proj_bias)
    nn.init.normal_(attention.out_proj.bias)
    return attention.requires_grad_(False)


@pytest.fixture
def stream() -> Tensor:
    return torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1))


def test_in_another_basis_attention_is_the_same(mha: nn.Module, stream: Tensor) -> None:
    slim = SlimAttention.from_dense(mha, range(HEADS), bases=bases())
    assert not torch.allclose(slim.in_proj_weight[:WIDTH], mha.in_proj_weight[:WIDTH], atol=1e-2)
    expected = mha(stream, stream, stream)[0]
    torch.testing.assert_close(slim(stream)[0], expected, atol=1e-4, rtol=1e-4)


def test_fewer_directions_are_those_masked(mha: nn.Module, stream: Tensor) -> None:
    """By hand: heads 0 and 2, of which the first 5 directions, or 7, are read."""
    heads, qk_dim, v_dim = [0, 2], 5, 7
    slim = SlimAttention.from_dense(mha, heads, qk_dim=qk_dim, v_dim=v_dim, bases=bases())
    assert slim.in_proj_weight.shape == (2 * (2 * qk_dim + v_dim), WIDTH)
    assert slim.out_proj.weight.shape == (WIDTH, 2 * v_dim)
    own, found = bases(), mha.out_proj.bias.expand_as(stream).clone()
    thirds = zip(mha.in_proj_weight.chunk(3), mha.in_proj_bias.chunk(3), strict=True)
    q, k, v = ((stream @ w.T + b).unflatten(-1, (HEADS, D)) for w, b in thirds)
    for h in heads:
        t, u = own["qk"][h], own["vo"][h]
        a, b = (q[:, :, h] @ t.T)[..., :qk_dim], (k[:, :, h] @ torch.linalg.inv(t))[..., :qk_dim]
        weights = (a @ b.transpose(1, 2) * D**-0.5).softmax(-1)
        columns = mha.out_proj.weight.unflatten(1, (HEADS, D))[:, h] @ torch.linalg.inv(u)
        found += (weights @ (v[:, :, h] @ u.T))[..., :v_dim] @ columns[:, :v_dim].T
    torch.testing.assert_close(slim(stream)[0], found, atol=1e-4, rtol=1e-4)
    fused, plain = slim(stream)[0], slim(stream, need_weights=True)[0]
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-5)
    other = slim(stream, stream.clone(), stream.clone())[0]  # Queries, keys and values apart.
    torch.testing.assert_close(other, fused, atol=1e-5, rtol=1e-5)


def test_a_slim_attention_is_cut_again(mha: nn.Module, stream: Tensor) -> None:
    once = SlimAttention.from_dense(mha, [0, 2, 3], qk_dim=6, v_dim=8, bases=bases())
    twice = SlimAttention.from_dense(once, [2], qk_dim=4, v_dim=5)
    at_once = SlimAttention.from_dense(mha, [2], qk_dim=4, v_dim=5, bases=bases())
    assert twice.head_dim == D
    torch.testing.assert_close(twice(stream)[0], at_once(stream)[0])
    with pytest.raises(OptionError, match="qk_dim is 5, expected 1 to 4"):
        SlimAttention.from_dense(twice, [2], qk_dim=5)


def test_the_logits_keep_the_dense_scale() -> None:
    query = torch.ones(1, 4)
    assert scaled(query, 4) is query
    torch.testing.assert_close(scaled(query, 16) * 4**-0.5, query * 16**-0.5)


def test_a_basis_and_its_dual_cancel() -> None:
    rows, basis = torch.arange(24.0).view(8, 3), bases()["qk"][:2, :4, :4]
    both = turned(rows, basis).view(2, 4, 3).transpose(1, 2) @ turned(rows, dual(basis)).view(
        2, 4, 3
    )
    plain = rows.view(2, 4, 3)
    torch.testing.assert_close(both, plain.transpose(1, 2) @ plain, atol=1e-2, rtol=1e-4)


@pytest.fixture
def directory(
    tmp_path: Path,
    make_tower: Callable[..., nn.Module],
    slim_spec: Callable[..., tuple[SlimSpec, dict[str, Tensor]]],
    checkpoint: SlimCheckpoint,
) -> Path:
    """A checkpoint of version 2: block 1 has two of four heads, and of those some directions."""
    tower = make_tower()
    block = ATTENTION.removesuffix(".attn")
    spec, mask = slim_spec(tower.state_dict())
    more = [LayerSpec(f"{ATTENTION}.{k}", k, block, D, n, 1) for k, n in (("qk", 5), ("vo", D))]
    layers = (*spec.layers, *more)
    spec = replace(spec, layers=layers, format_version=version_of(layers))
    mask |= {layer.name: torch.arange(layer.kept) for layer in more}
    own = {f"{ATTENTION}.qk": bases()["qk"]}
    with_bases = replace(checkpoint, spec=spec, mask=mask, bases=own)
    # The tensors are what the dense tower's are, turned and cut.
    shapes = {k: v for k, v in checkpoint.tower().items() if not k.startswith(ATTENTION)}
    slim = SlimAttention.from_dense(
        tower.get_submodule(ATTENTION), mask[ATTENTION], qk_dim=5, bases={"qk": bases()["qk"]}
    )
    shapes |= {f"{ATTENTION}.{name}": tensor for name, tensor in slim.state_dict().items()}
    tensors = {f"visual.{name}": tensor for name, tensor in shapes.items()}
    return write(tmp_path / "two", spec, tensors, mask, card="# A card\n", bases=with_bases.bases)


def test_it_is_written_read_loaded_and_applied(
    directory: Path, make_tower: Callable[..., nn.Module], images: Tensor
) -> None:
    checkpoint = read(directory)
    assert checkpoint.spec.format_version == 2
    assert torch.equal(checkpoint.bases[f"{ATTENTION}.qk"], bases()["qk"])
    assert checkpoint.mask[f"{ATTENTION}.qk"].tolist() == [0, 1, 2, 3, 4]
    jsonschema.validate(json.loads((directory / "config.json").read_text()), schema())
    with torch.no_grad():
        found = load(directory)(images)
        for weights in ("slim", "target"):
            tower = make_tower()
            apply(tower, checkpoint, weights=weights)  # type: ignore[arg-type]
            torch.testing.assert_close(tower(images), found, atol=1e-4, rtol=1e-4)


def _mask(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        tensors = load_file(directory / "mask.safetensors")
        change(tensors)
        save_file({k: v.contiguous() for k, v in tensors.items()}, directory / "mask.safetensors")
        relist(directory)

    return damage


def _config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        change(config)
        (directory / "config.json").write_text(json.dumps(config))

    return damage


QK = f"{ATTENTION}.qk"
BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "no basis": (_mask(lambda t: t.pop(f"{QK}.basis")), f"lacks basis of {QK}"),
    "a basis of nothing": (
        _mask(lambda t: t.update({"x.qk.basis": torch.eye(2)[None]})),
        r"unknown basis of x\.qk",
    ),
    "a basis of another shape": (
        _mask(lambda t: t.update({f"{QK}.basis": torch.ones(HEADS, D, 3)})),
        r"\(4, 12, 3\), expected floating point \(4, 12, 12\)",
    ),
    "a basis of whole numbers": (
        _mask(lambda t: t.update({f"{QK}.basis": t[f"{QK}.basis"].long()})),
        "int64",
    ),
    "a singular basis": (
        _mask(lambda t: t[f"{QK}.basis"][1].zero_()),
        "cannot be inverted",
    ),
    "not finite": (
        _mask(lambda t: t[f"{QK}.basis"][1].fill_(torch.nan)),
        "cannot be inverted",
    ),
    "other directions": (
        _mask(lambda t: t.update({QK: torch.tensor([0, 1, 2, 3, 7])})),
        "keeps the direction 7, expected the first 5",
    ),
    "version 1": (
        _config(lambda c: c.update(format_version=1)),
        "is of the kind 'qk', which format_version 1 does not have",
    ),
    "of no heads": (
        _config(lambda c: c["layers"][-1].update(name="transformer.resblocks.1.mlp.vo")),
        "does not fit the heads that it lies in",
    ),
    "of other heads": (
        _config(lambda c: c["layers"][-1].update(units=D + 1)),
        "does not fit the heads that it lies in",
    ),
    "with slices": (
        _config(lambda c: c["layers"][-1].update(slices=c["layers"][1]["slices"])),
        "does not fit the heads that it lies in",
    ),
    "another width": (
        _config(lambda c: c["layers"][-1].update(kept=D - 1)),
        "the config says 11",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_refused(directory: Path, what: str) -> None:
    damage, message = BAD[what]
    damage(directory)
    with pytest.raises(CheckpointError, match=message):
        read(directory)


def test_tensors_of_other_widths_are_refused(directory: Path) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    name = f"visual.{ATTENTION}.in_proj_weight"
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, file)
    relist(directory)
    with pytest.raises(CheckpointError, match=r"in_proj_weight has shape .* of width 5 and 12"):
        read(directory)
