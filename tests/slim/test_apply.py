from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ovsprune.core.errors import OptionError, TargetError
from ovsprune.slim.apply import apply, map_name
from ovsprune.slim.attention import SlimAttention
from ovsprune.slim.read import SlimCheckpoint

Make = Callable[..., nn.Module]


def identity(tower: nn.Module) -> dict[str, Any]:
    """Return modules, parameters and buffers of a tower as objects, with copies of the values."""
    return {
        "modules": dict(tower.named_modules(remove_duplicate=False)),
        "parameters": dict(tower.named_parameters(remove_duplicate=False)),
        "values": {k: v.clone() for k, v in tower.state_dict().items()},
        "flags": {k: p.requires_grad for k, p in tower.named_parameters()},
        "training": {k: m.training for k, m in tower.named_modules()},
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for what in ("modules", "parameters"):
        assert before[what].keys() == after[what].keys()
        assert list(before[what]) == list(after[what])
        assert all(before[what][name] is after[what][name] for name in before[what])
    assert list(before["values"]) == list(after["values"])
    assert all(torch.equal(before["values"][k], after["values"][k]) for k in before["values"])
    assert before["flags"] == after["flags"]
    assert before["training"] == after["training"]


@pytest.mark.parametrize("weights", ["slim", "target"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_equals_the_masked_dense_tower(
    make_tower: Make,
    checkpoint: SlimCheckpoint,
    masked: Callable[..., nn.Module],
    images: Tensor,
    weights: Any,
    batch_first: bool,
) -> None:
    finetuned = make_tower(seed=5, batch_first=batch_first)
    source = finetuned if weights == "target" else make_tower(batch_first=batch_first)
    expected = masked(copy.deepcopy(source), checkpoint)(images)
    with torch.no_grad():
        dense = finetuned(images)
        applied = apply(finetuned, checkpoint, weights=weights)
        out = finetuned(images)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert (out - dense).abs().max() > 0.01
    attention = finetuned.get_submodule("transformer.resblocks.0.attn")
    assert isinstance(attention, SlimAttention) and attention.batch_first is batch_first
    assert "transformer.resblocks.2.attn" not in applied.replaced  # all of its heads stay
    assert len(applied.replaced) == 2 + 2 * 3


@pytest.mark.parametrize("weights", ["slim", "target"])
def test_detach_restores_the_original(
    make_tower: Make, checkpoint: SlimCheckpoint, images: Tensor, weights: Any
) -> None:
    tower = make_tower(seed=5)
    tower.proj.requires_grad_(False)
    tower.transformer.resblocks[1].train()
    before = identity(tower)
    applied = apply(tower, checkpoint, weights=weights)
    flags = {name: p.requires_grad for name, p in tower.named_parameters()}
    assert flags == before["flags"]
    assert {k: m.training for k, m in tower.named_modules()} == before["training"]
    # whatever happens to the slim tower meanwhile
    with torch.no_grad():
        for parameter in tower.parameters():
            if weights == "slim":
                parameter.mul_(2)
    tower(images)
    applied.detach()
    assert_same(before, identity(tower))
    applied.detach()
    assert_same(before, identity(tower))


def test_context_manager_detaches(make_tower: Make, checkpoint: SlimCheckpoint) -> None:
    tower = make_tower()
    before = identity(tower)
    with apply(tower, checkpoint) as applied:
        assert isinstance(tower.get_submodule(applied.replaced[0]), SlimAttention)
    assert_same(before, identity(tower))


def test_state_equals_the_checkpoint(make_tower: Make, checkpoint: SlimCheckpoint) -> None:
    tower = make_tower(seed=5)
    applied = apply(tower, checkpoint)
    state = tower.state_dict()
    assert state.keys() == checkpoint.tower().keys()
    for name, value in checkpoint.tower().items():
        assert torch.equal(state[name], value), name
        assert state[name].data_ptr() != value.data_ptr()  # training leaves the checkpoint alone
    assert "proj" in applied.loaded and applied.unused == ()


def test_kept_tensors_are_not_loaded(make_tower: Make, checkpoint: SlimCheckpoint) -> None:
    tower = make_tower(seed=5)
    own = tower.positional_embedding
    norm = tower.transformer.resblocks[0].ln_1.weight
    keep = ("positional_embedding", "transformer.resblocks.0.ln_1")
    applied = apply(tower, checkpoint, keep=keep)
    assert tower.positional_embedding is own
    assert tower.transformer.resblocks[0].ln_1.weight is norm
    assert set(applied.unused) == {keep[0], f"{keep[1]}.weight", f"{keep[1]}.bias"}
    assert torch.equal(tower.proj, checkpoint.tower()["proj"])


def test_dtype_and_layout_are_kept(make_tower: Make, checkpoint: SlimCheckpoint) -> None:
    tower = make_tower().to(torch.bfloat16)
    apply(tower, checkpoint)
    assert {p.dtype for p in tower.parameters()} == {torch.bfloat16}


def test_hooks_are_kept(make_tower: Make, checkpoint: SlimCheckpoint, images: Tensor) -> None:
    tower, calls = make_tower(), []
    for name in ("attn", "mlp.c_fc"):
        module = tower.get_submodule(f"transformer.resblocks.0.{name}")
        module.register_forward_hook(lambda m, args, out: calls.append(type(m).__name__))
    apply(tower, checkpoint)
    tower(images)
    assert calls == ["SlimAttention", "Linear"]


def test_subclasses_are_kept(make_tower: Make, checkpoint: SlimCheckpoint, images: Tensor) -> None:
    class Loud(nn.Linear):
        pass

    tower = make_tower()
    tower.transformer.resblocks[0].mlp.c_fc.__class__ = Loud
    apply(tower, checkpoint)
    fc = tower.transformer.resblocks[0].mlp.c_fc
    assert type(fc) is Loud
    assert fc.out_features == fc.weight.shape[0] == 48


def test_slim_tower_can_be_copied(
    make_tower: Make, checkpoint: SlimCheckpoint, images: Tensor
) -> None:
    tower = make_tower()
    apply(tower, checkpoint)
    assert torch.equal(copy.deepcopy(tower)(images), tower(images))


class Framework(nn.Module):
    """Tower split in two lists of blocks, as in SAN, with some layers registered twice."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        blocks = tower.transformer.resblocks
        self.encoder = nn.Module()
        self.encoder.conv1, self.encoder.ln_pre = tower.conv1, tower.ln_pre
        self.encoder.cls_token = nn.Parameter(tower.class_embedding.data[None, None])
        self.encoder.pos = nn.Parameter(tower.positional_embedding.data[None])
        self.encoder.layers = blocks[:2]
        self.head = nn.Module()
        self.head.layers, self.head.ln_post = blocks[2:], tower.ln_post
        self.head.proj = tower.proj
        self.shared = nn.ModuleList([block.mlp.c_fc for block in blocks])
        self.other = nn.GELU()  # not the tower's


PREFIXES = {
    "conv1": "encoder.conv1",
    "ln_pre": "encoder.ln_pre",
    "class_embedding": "encoder.cls_token",
    "positional_embedding": "encoder.pos",
    "transformer.resblocks": "encoder.layers",
    "transformer.resblocks.2": "head.layers.0",
    "ln_post": "head.ln_post",
    "proj": "head.proj",
}


def test_tower_split_in_parts(make_tower: Make, checkpoint: SlimCheckpoint) -> None:
    model = Framework(make_tower(seed=5))
    before = identity(model)
    applied = apply(model, checkpoint, prefix_map=PREFIXES)
    assert isinstance(model.encoder.layers[1].attn, SlimAttention)
    assert model.shared[2] is model.head.layers[0].mlp.c_fc  # in every place
    assert model.shared[2].weight.shape == (50, 48)
    assert model.encoder.pos.shape == (1, 17, 48)
    assert torch.equal(model.encoder.pos[0], checkpoint.tower()["positional_embedding"])
    assert "head.layers.0.mlp.c_fc" in applied.replaced
    applied.detach()
    assert_same(before, identity(model))


def test_map_name_replaces_the_longest_dotted_prefix() -> None:
    assert map_name("transformer.resblocks.2.attn", PREFIXES) == "head.layers.0.attn"
    assert map_name("transformer.resblocks.20.attn", PREFIXES) == "encoder.layers.20.attn"
    assert map_name("ln_pre.weight", PREFIXES) == "encoder.ln_pre.weight"
    assert map_name("ln_press", PREFIXES) == "ln_press"


def test_positions_of_another_grid_are_interpolated(
    make_tower: Make, checkpoint: SlimCheckpoint
) -> None:
    larger = make_tower(size=96)
    apply(larger, checkpoint)
    assert larger.positional_embedding.shape == (37, 48)
    assert torch.equal(
        larger.positional_embedding[0], checkpoint.tower()["positional_embedding"][0]
    )
    assert larger(torch.randn(1, 3, 96, 96)).shape == (1, 24)


def linear_instead(tower: nn.Module) -> None:
    tower.transformer.resblocks[0].mlp.c_fc = nn.Sequential(nn.Linear(48, 96))


def wide_mlp(tower: nn.Module) -> None:
    tower.transformer.resblocks[0].mlp.c_fc = nn.Linear(48, 128)


def other_proj(tower: nn.Module) -> None:
    tower.proj = nn.Parameter(torch.zeros(48, 32))


def other_width(tower: nn.Module) -> None:
    tower.transformer.resblocks[0].attn.in_proj_weight = nn.Parameter(torch.zeros(96, 48))


def no_activation(tower: nn.Module) -> None:
    for block in tower.transformer.resblocks:
        block.mlp.gelu = nn.Identity()


@pytest.mark.parametrize(
    ("make", "change", "message"),
    [
        ({"activation": "gelu"}, None, "the tower uses gelu, the checkpoint was pruned with quick"),
        ({"heads": 8}, None, r"resblocks\.0\.attn has 8 heads, expected 4 of a dense ViT-T-16"),
        ({}, no_activation, "contain no known activation module; .* by activation="),
        ({}, wide_mlp, r"c_fc has a weight of shape \(128, 48\), expected 96 on axis 0 for a"),
        ({}, linear_instead, r"has no tensor transformer\.resblocks\.0\.mlp\.c_fc\.bias"),
        (
            {},
            other_proj,
            r"other shapes than the checkpoint: proj \(48, 32\) instead of \(48, 24\)",
        ),
        ({}, other_width, r"in_proj_weight has shape \(96, 48\), expected 144 on axis 0"),
    ],
)
def test_wrong_tower_is_refused_and_unchanged(
    make_tower: Make,
    checkpoint: SlimCheckpoint,
    make: dict[str, Any],
    change: Callable[[nn.Module], None] | None,
    message: str,
) -> None:
    tower = make_tower(**make)
    if change is not None:
        change(tower)
    before = identity(tower)
    with pytest.raises(TargetError, match=message):
        apply(tower, checkpoint)
    assert_same(before, identity(tower))


def test_activation_function_can_be_given(make_tower: Make, checkpoint: SlimCheckpoint) -> None:
    tower = make_tower()
    no_activation(tower)
    with pytest.raises(TargetError, match="the tower uses gelu, the checkpoint"):
        apply(tower, checkpoint, activation="gelu")
    with pytest.raises(OptionError, match="activation is 'swish', expected one of quick_gelu"):
        apply(tower, checkpoint, activation="swish")
    assert apply(tower, checkpoint, activation="quick_gelu").replaced


def test_slim_tower_is_refused(make_tower: Make, checkpoint: SlimCheckpoint) -> None:
    tower = make_tower()
    apply(tower, checkpoint)
    before = identity(tower)
    with pytest.raises(TargetError, match="is slim already; detach the slim tower first"):
        apply(tower, checkpoint)
    assert_same(before, identity(tower))


@pytest.mark.parametrize("weights", ["slim", "target"])
def test_clip_model_is_refused(make_tower: Make, checkpoint: SlimCheckpoint, weights: Any) -> None:
    """Leave the text tower alone, whose blocks have the same names."""
    clip = nn.Module()
    clip.transformer = make_tower(seed=9).transformer
    clip.visual = make_tower()
    before = identity(clip)
    with pytest.raises(TargetError, match=r"looks like a whole CLIP: pass its \.visual"):
        apply(clip, checkpoint, weights=weights)
    assert_same(before, identity(clip))


def test_unknown_weights_option_is_refused(make_tower: Make, checkpoint: SlimCheckpoint) -> None:
    with pytest.raises(OptionError, match="weights is 'mine', expected 'slim' or 'target'"):
        apply(make_tower(), checkpoint, weights="mine")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*jit")
def test_torchscript_is_refused(checkpoint: SlimCheckpoint) -> None:
    with pytest.raises(TargetError, match="TorchScript"):
        apply(torch.jit.script(nn.Linear(1, 1)), checkpoint)


def test_detach_after_another_change(make_tower: Make, checkpoint: SlimCheckpoint) -> None:
    tower = make_tower()
    applied = apply(tower, checkpoint)
    slim = tower.transformer.resblocks[0].attn
    tower.transformer.resblocks[0].attn = nn.Identity()
    with pytest.raises(TargetError, match=r"resblocks\.0\.attn was replaced by something else"):
        applied.detach()
    tower.transformer.resblocks[0].attn = slim
    applied.detach()
    assert isinstance(tower.transformer.resblocks[0].attn, nn.MultiheadAttention)
