"""Fixtures: a small CLIP image tower of open_clip, and slim checkpoints of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ovsprune.core.records import Costs, Preprocess
from ovsprune.slim.cutting import cut_state
from ovsprune.slim.hashing import base_spec
from ovsprune.slim.read import SlimCheckpoint, read
from ovsprune.slim.spec import LayerSpec, SliceSpec, SlimSpec
from ovsprune.slim.write import write

WIDTH, HEADS, LAYERS, MLP, SIZE, PATCH, OUT = 48, 4, 3, 96, 64, 16, 24
KEPT_HEADS = ([0, 2], [1, 2, 3], [0, 1, 2, 3])


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)  # the tensors are tiny: threads would only wait for each other


@pytest.fixture
def make_tower() -> Callable[..., nn.Module]:
    """Return a builder of dense towers with random weights, biases and norms included."""
    from open_clip.transformer import QuickGELU, Transformer, VisionTransformer

    def make(
        activation: str = "quick_gelu",
        *,
        batch_first: bool = True,
        size: int | tuple[int, int] = SIZE,
        heads: int = HEADS,
        seed: int = 0,
        **options: Any,
    ) -> nn.Module:
        torch.manual_seed(seed)
        act = {"quick_gelu": QuickGELU, "gelu": nn.GELU}[activation]
        tower = VisionTransformer(
            image_size=size,
            patch_size=PATCH,
            width=WIDTH,
            layers=LAYERS,
            heads=heads,
            mlp_ratio=MLP / WIDTH,
            output_dim=OUT,
            act_layer=act,
            **options,
        )
        if not batch_first:
            tower.transformer = Transformer(
                WIDTH, LAYERS, heads, MLP / WIDTH, act_layer=act, batch_first=False
            )
        torch.manual_seed(seed)  # the same weights, however it was built
        with torch.no_grad():
            for name, parameter in tower.named_parameters():
                noise = torch.randn_like(parameter)
                if name.endswith(("ln_1.weight", "ln_2.weight", "ln_pre.weight", "ln_post.weight")):
                    parameter.copy_(1 + 0.1 * noise)
                else:
                    parameter.copy_(0.15 * noise)
        return tower.eval()

    return make


@pytest.fixture
def slim_spec() -> Callable[..., tuple[SlimSpec, dict[str, Tensor]]]:
    """Return a builder of spec and mask of a tower that lost some heads and MLP units."""

    def make(
        state: dict[str, Tensor], activation: str = "quick_gelu", **changes: Any
    ) -> tuple[SlimSpec, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(7)
        layers, mask = [], {}
        for i in range(LAYERS):
            block = f"transformer.resblocks.{i}"
            heads = torch.tensor(KEPT_HEADS[i])
            units = torch.randperm(MLP, generator=generator)[: MLP // 2 + i].sort().values
            mask[f"{block}.attn"], mask[f"{block}.mlp"] = heads, units
            layers += [
                LayerSpec(f"{block}.attn", "heads", block, HEADS, len(heads), WIDTH // HEADS, ()),
                LayerSpec(
                    f"{block}.mlp",
                    "mlp",
                    block,
                    MLP,
                    len(units),
                    1,
                    (SliceSpec(f"{block}.mlp.c_fc", "out"), SliceSpec(f"{block}.mlp.c_proj", "in")),
                ),
            ]
        spec = SlimSpec(
            base=base_spec("ViT-T-16", "test", True, state),
            family="open_clip-vit",
            library="open_clip_torch",
            library_version="3.3.0",
            architecture={"embed_dim": OUT, "vision_cfg": {"image_size": SIZE, "head_width": 12}},
            activation=activation,
            preprocess=Preprocess((SIZE, SIZE)),
            layers=tuple(layers),
            protected=("transformer.resblocks.2.attn",),
            dense=Costs(1000, 100),
            slim=Costs(500, 60),
            provenance={"criterion": "magnitude", "seed": 0},
        )
        return replace(spec, **changes), mask

    return make


@pytest.fixture
def write_slim(
    tmp_path: Path, slim_spec: Callable[..., tuple[SlimSpec, dict[str, Tensor]]]
) -> Callable[..., Path]:
    """Return a function that writes the slim checkpoint of a dense tower."""

    def make(tower: nn.Module, name: str = "slim", **changes: Any) -> Path:
        state = tower.state_dict()
        spec, mask = slim_spec(state, **changes)
        tensors = {f"visual.{k}": v for k, v in cut_state(state, spec, mask).items()}
        return write(tmp_path / name, spec, tensors, mask, card="# A card\n")

    return make


@pytest.fixture
def checkpoint(make_tower: Any, write_slim: Any) -> SlimCheckpoint:
    """Return the slim checkpoint of ``make_tower()``."""
    return read(write_slim(make_tower()))


@pytest.fixture
def masked() -> Callable[[nn.Module, SlimCheckpoint], nn.Module]:
    """Return a function that sets the removed units of a dense tower to zero, in place."""

    @torch.no_grad()
    def mask_units(tower: nn.Module, checkpoint: SlimCheckpoint) -> nn.Module:
        for layer in checkpoint.spec.layers:
            consumer = "out_proj" if layer.kind == "heads" else "c_proj"
            weight = tower.get_submodule(f"{layer.name}.{consumer}").weight
            gone = torch.ones(layer.units, dtype=torch.bool)
            gone[checkpoint.mask[layer.name]] = False
            weight[:, gone.repeat_interleave(layer.unit_width)] = 0.0
        return tower

    return mask_units


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
