"""Tests that the residual network equals open_clip's, dense and pruned."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ovsprune.core.errors import CheckpointError, OptionError
from ovsprune.core.records import Costs, Preprocess
from ovsprune.slim.apply import apply
from ovsprune.slim.cutting import cut_state
from ovsprune.slim.hashing import base_spec
from ovsprune.slim.load import SlimTower, load
from ovsprune.slim.read import read
from ovsprune.slim.spec import LayerSpec, SliceSpec, SlimSpec
from ovsprune.slim.vit import resize_positions
from ovsprune.slim.write import write

SIZE, WIDTH, OUT = 64, 8, 24


def make_tower(size: int = SIZE, seed: int = 0) -> Any:
    """Build open_clip's tower with random parameters, norm statistics included."""
    from open_clip.modified_resnet import ModifiedResNet

    tower = ModifiedResNet([2, 1, 1, 2], OUT, 4, size, WIDTH)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in tower.state_dict().items():
            if name.endswith(("running_var", ".weight")) and tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point() and tensor.ndim <= 1:
                tensor.normal_(0, 0.2, generator=generator)
            elif name.endswith("positional_embedding") and tensor.shape[0] != 5:
                pass  # of another size: set by the test
            elif tensor.is_floating_point():
                scale = tensor[0].numel() ** -0.5
                tensor.normal_(0, scale, generator=generator)
    return tower.eval()


def spec_of(state: dict[str, Tensor]) -> tuple[SlimSpec, dict[str, Tensor]]:
    """Keep half of the channels of every inner convolution, and a few more."""
    generator = torch.Generator().manual_seed(7)
    layers, mask = [], {}
    blocks = [n.removesuffix(".conv1.weight") for n in state if n.endswith(".conv1.weight")]
    for block in blocks:
        for made, norm, read_by in (("conv1", "bn1", "conv2"), ("conv2", "bn2", "conv3")):
            name, units = f"{block}.{made}", state[f"{block}.{made}.weight"].shape[0]
            kept = torch.randperm(units, generator=generator)[: units // 2 + len(layers) % 3]
            mask[name] = kept.sort().values
            slices = (SliceSpec(name, "out"), SliceSpec(f"{block}.{norm}", "out"),
                      SliceSpec(f"{block}.{read_by}", "in"))  # fmt: skip
            layers.append(LayerSpec(name, "channels", block, units, len(kept), 1, slices))
    spec = SlimSpec(
        base=base_spec("RN", "test", True, state),
        family="open_clip-resnet",
        library="open_clip_torch",
        library_version="3.3.0",
        architecture={"embed_dim": OUT, "vision_cfg": {"image_size": SIZE, "width": WIDTH}},
        activation="relu",
        preprocess=Preprocess((SIZE, SIZE)),
        layers=tuple(layers),
        protected=(),
        dense=Costs(1000, 100),
        slim=Costs(500, 60),
    )
    return spec, mask


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    state = make_tower().state_dict()
    spec, mask = spec_of(state)
    tensors = {f"visual.{k}": v for k, v in cut_state(state, spec, mask).items()}
    return write(tmp_path / "slim", spec, tensors, mask, card="")


@pytest.fixture
def whole(tmp_path: Path) -> SlimTower:
    """Load a tower with the weights of a dense one."""
    state = make_tower().state_dict()
    spec, _ = spec_of(state)
    spec = replace(spec, layers=())
    return load(
        write(tmp_path / "dense", spec, {f"visual.{k}": v for k, v in state.items()}, {}, card="")
    )


def dense_features(tower: Any, images: Tensor) -> Tensor:
    """Compute the dense features of open_clip's tower, independently of the package."""
    x = tower.stem(images)
    for i in range(1, 5):
        x = tower.get_submodule(f"layer{i}")(x)
    pool = tower.attnpool
    value = torch.einsum("oc,bchw->bohw", pool.v_proj.weight, x) + pool.v_proj.bias.view(-1, 1, 1)
    return torch.einsum("oc,bchw->bohw", pool.c_proj.weight, value) + pool.c_proj.bias.view(
        -1, 1, 1
    )


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def close(one: Tensor, other: Tensor) -> None:
    assert (one - other).abs().max() / other.std() < 1e-5


@torch.no_grad()
def test_loaded_tower_equals_open_clip(whole: SlimTower, images: Tensor) -> None:
    tower = make_tower()
    close(whole(images), tower(images))
    close(whole.dense(images), dense_features(tower, images))
    assert whole.tower.state_dict().keys() == tower.state_dict().keys()
    # Negative control: other weights change the output.
    assert (whole(images) - make_tower(seed=1)(images)).abs().max() > 0.1


@torch.no_grad()
def test_slim_tower_equals_the_masked_dense_tower(saved: Path, images: Tensor) -> None:
    checkpoint, slim, masked = read(saved), load(saved), make_tower()
    for layer in checkpoint.spec.layers:
        removed = torch.ones(layer.units, dtype=torch.bool)
        removed[checkpoint.mask[layer.name]] = False
        masked.get_submodule(layer.slices[-1].module).weight[:, removed] = 0.0
    close(slim(images), masked(images))
    close(slim.dense(images), dense_features(masked, images))
    assert (slim(images) - make_tower()(images)).abs().max() > 0.1
    applied = make_tower()
    before = applied(images)
    done = apply(applied, checkpoint)
    close(slim(images), applied(images))
    assert slim.tower.layer1[0].conv2.weight.shape == (5, 4, 3, 3)
    done.detach()
    assert torch.equal(applied(images), before)
    state = slim.tower.state_dict()
    assert all(torch.equal(state[name], value) for name, value in checkpoint.tower().items())


@pytest.mark.parametrize("size", [32, 96, 128])
@torch.no_grad()
def test_other_input_sizes_equal_open_clips_with_resized_positions(
    saved: Path, whole: SlimTower, size: int
) -> None:
    images = torch.randn(2, 3, size, size)
    grid = size // 32
    resized, native = make_tower(size), make_tower().attnpool.positional_embedding
    resized.load_state_dict(
        {
            **make_tower().state_dict(),
            "attnpool.positional_embedding": resize_positions(native, (2, 2), (grid, grid)),
        }
    )
    close(whole(images), resized(images))
    close(whole.dense(images), dense_features(resized, images))
    # A tower built for another size gets the resized positions of the checkpoint.
    apply(resized, read(saved))
    close(load(saved)(images), resized(images))


@torch.no_grad()
def test_sizes_that_are_not_square_or_no_multiple_of_the_stride(whole: SlimTower) -> None:
    assert whole.dense(torch.randn(1, 3, 64, 100)).shape == (1, OUT, 2, 3)
    assert whole(torch.randn(1, 3, 70, 64)).shape == (1, OUT)
    half = deepcopy(whole).to(torch.bfloat16)
    found = half(torch.randn(1, 3, 96, 64).bfloat16())
    assert found.dtype == torch.bfloat16 and found.isfinite().all()


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 31, 64)])
def test_images_of_another_shape_are_refused(whole: SlimTower, shape: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match=r"images have shape .*, expected \[B, 3, H, W\] .* 32"):
        whole(torch.zeros(shape))
    with pytest.raises(OptionError, match="images have shape"):
        whole.dense(torch.zeros(shape))


def test_another_activation_is_refused(saved: Path) -> None:
    from ovsprune.core.errors import TargetError

    tower = make_tower()
    for module in list(tower.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.GELU())
    with pytest.raises(TargetError, match="uses gelu, the checkpoint was pruned with relu"):
        apply(tower, read(saved))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("visual.conv2.weight"), r"residual network \('conv2\.weight'\)"),
        (lambda t: t.pop("visual.bn2.bias"), r"bn2\.bias None instead of \(4,\)"),
        (lambda t: t.update({"visual.layer9.0.bn1.bias": torch.zeros(2)}), r"layer\[1, 2, 3, 4, 9"),
        (
            lambda t: t.update({"visual.attnpool.positional_embedding": torch.zeros(4, 256)}),
            "has 3 patch positions",
        ),
    ],
)
def test_tensors_that_do_not_form_the_tower_are_refused(
    saved: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    checkpoint = read(saved)
    tensors = dict(checkpoint.tensors)
    change(tensors)
    path = write(tmp_path / "odd", checkpoint.spec, tensors, checkpoint.mask, card="")
    with pytest.raises(CheckpointError, match=message):
        load(path)


def test_head_width_that_is_no_divisor_is_refused(saved: Path, tmp_path: Path) -> None:
    checkpoint = read(saved)
    spec = replace(checkpoint.spec, architecture={"vision_cfg": {"head_width": 60}})
    path = write(tmp_path / "odd", spec, checkpoint.tensors, checkpoint.mask, card="")
    with pytest.raises(CheckpointError, match="head_width is 60, which does not divide 256"):
        load(path)
