"""Random towers, slim checkpoints built by hand, and images, for the tests of targets."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ovsprune.core.records import Costs, Preprocess
from ovsprune.slim import SlimCheckpoint
from ovsprune.slim.cutting import cut_state
from ovsprune.slim.hashing import base_spec
from ovsprune.slim.spec import BaseSpec, LayerSpec, SliceSpec, SlimSpec
from ovsprune.slim.write import write
from ovsprune.targets import TARGETS
from ovsprune.targets.layout import Layout

Kept = Mapping[str, list[int]]


def lively_tower(
    *, width: int, depth: int, heads: int, patch: int, size: int, outputs: int, mlp: int, seed: int
) -> dict[str, Tensor]:
    """Draw CLIP ViT weights with sharp attention and units of different norms."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=draw) * std

    def heavy(count: int) -> Tensor:
        return torch.exp(0.7 * torch.randn(count, generator=draw))

    tokens = (size // patch) ** 2 + 1
    state = {
        "class_embedding": normal(width, std=0.3),
        "positional_embedding": normal(tokens, width, std=0.3),
        "conv1.weight": normal(width, 3, patch, patch, std=1.0 / patch),
        "proj": normal(width, outputs, std=width**-0.5),
    }
    for norm in ("ln_pre", "ln_post"):
        state[f"{norm}.weight"] = 1 + normal(width, std=0.2)
        state[f"{norm}.bias"] = normal(width, std=0.1)
    for i in range(depth):
        block = f"transformer.resblocks.{i}"
        for norm in ("ln_1", "ln_2"):
            state[f"{block}.{norm}.weight"] = 1 + normal(width, std=0.2)
            state[f"{block}.{norm}.bias"] = normal(width, std=0.1)
        sharp = torch.tensor([1.4, 1.4, 1.0]).repeat_interleave(width)[:, None]
        state[f"{block}.attn.in_proj_weight"] = normal(3 * width, width, std=width**-0.5) * sharp
        state[f"{block}.attn.in_proj_bias"] = normal(3 * width, std=0.1)
        per_head = heavy(heads).repeat_interleave(width // heads)
        out = normal(width, width, std=0.5 * width**-0.5) * per_head
        state[f"{block}.attn.out_proj.weight"] = out
        state[f"{block}.attn.out_proj.bias"] = normal(width, std=0.05)
        state[f"{block}.mlp.c_fc.weight"] = normal(mlp, width, std=width**-0.5)
        state[f"{block}.mlp.c_fc.bias"] = normal(mlp, std=0.1)
        state[f"{block}.mlp.c_proj.weight"] = normal(width, mlp, std=0.5 * mlp**-0.5) * heavy(mlp)
        state[f"{block}.mlp.c_proj.bias"] = normal(width, std=0.05)
    return state


def random_kept(depth: int, heads: int, mlp: int, seed: int) -> dict[str, list[int]]:
    """Draw kept units, a different number in each block; the last block keeps all heads."""
    draw = torch.Generator().manual_seed(seed)
    kept = {}
    for i in range(depth):
        block = f"transformer.resblocks.{i}"
        for name, units in ((f"{block}.attn", heads), (f"{block}.mlp", mlp)):
            least = max(1, units // 4)
            count = int(torch.randint(least, units, (1,), generator=draw))
            chosen = torch.randperm(units, generator=draw)[:count].sort().values
            kept[name] = chosen.tolist()
    kept[f"transformer.resblocks.{depth - 1}.attn"] = list(range(heads))
    return kept


def magnitude_kept(state: Mapping[str, Tensor], heads: int, share: float) -> dict[str, list[int]]:
    """Return the units of largest weight over all blocks; widths differ, at least one unit each."""
    norms = {}
    for name, tensor in state.items():
        if name.endswith("mlp.c_proj.weight"):
            norms[name.removesuffix(".c_proj.weight")] = tensor.norm(dim=0)
        elif name.endswith("attn.out_proj.weight"):
            per_head = tensor.unflatten(1, (heads, -1)).flatten(2).norm(dim=(0, 2))
            norms[name.removesuffix(".out_proj.weight")] = per_head
    kept = {}
    for kind in ("attn", "mlp"):
        mine = {k: v for k, v in norms.items() if k.endswith(kind)}
        bar = torch.cat(list(mine.values())).quantile(1 - share)
        for name, norm in mine.items():
            chosen = (norm >= torch.minimum(bar, norm.max())).nonzero().flatten()
            kept[name] = chosen.tolist()
    return kept


def slim_by_hand(
    state: Mapping[str, Tensor],
    kept: Kept,
    *,
    heads: int,
    size: int,
    activation: str = "quick_gelu",
    trained: bool = True,
    text: Mapping[str, Tensor] | None = None,
    path: Path = Path("slim/by-hand"),
    base: BaseSpec | None = None,
) -> SlimCheckpoint:
    """Build a slim checkpoint of the base's tensors, cut by ``kept`` and not repaired."""
    width = state["conv1.weight"].shape[0]
    layers = []
    for name, chosen in kept.items():
        block = name.rpartition(".")[0]
        if name.endswith("attn"):
            layer = LayerSpec(name, "heads", block, heads, len(chosen), width // heads)
        else:
            mlp = state[f"{name}.c_fc.weight"].shape[0]
            parts = (SliceSpec(f"{name}.c_fc", "out"), SliceSpec(f"{name}.c_proj", "in"))
            layer = LayerSpec(name, "mlp", block, mlp, len(chosen), 1, parts)
        layers.append(layer)
    spec = SlimSpec(
        base=base or base_spec("ViT-by-hand", "random", trained, state),
        family="open_clip-vit",
        library="open_clip_torch",
        library_version="3.3.0",
        architecture={},
        activation=activation,
        preprocess=Preprocess((size, size)),
        layers=tuple(layers),
        protected=(),
        dense=Costs(2, 2),
        slim=Costs(1, 1),
    )
    mask = {name: torch.tensor(chosen, dtype=torch.int64) for name, chosen in kept.items()}
    tensors = {f"visual.{k}": v for k, v in cut_state(state, spec, mask).items()}
    return SlimCheckpoint(path, spec, mask, {**tensors, **(text or {})})


def shared_data() -> Path:
    """Return the folder of real images: ``OVSPRUNE_DATA``, by default ``shared/data``."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    return Path(os.environ.get("OVSPRUNE_DATA", beside))


def _real(count: int, side: int) -> Tensor | None:
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    files = sorted((shared_data() / "coco128" / "images").glob("*.jpg"))[:count]
    if len(files) < count:
        return None
    return torch.stack(
        [pil_to_tensor(Image.open(f).convert("RGB").resize((side, side))) for f in files]
    )


def _drawn(count: int, side: int) -> Tensor:
    from ovsprune.calibration.scenes import render_scene

    scenes = [render_scene(i, split="test", size=112).image for i in range(count)]
    pictures = torch.stack([torch.as_tensor(scene) for scene in scenes]).permute(0, 3, 1, 2)
    return torch.nn.functional.interpolate(pictures.float(), (side, side), mode="bilinear")


def load_pictures(count: int, side: int) -> Tensor:
    """Return preprocessed images, float32 [count, 3, side, side]: real ones, else rendered."""
    raw = _real(count, side)
    raw = _drawn(count, side) if raw is None else raw
    mean = torch.tensor(Preprocess((side, side)).mean)[:, None, None]
    std = torch.tensor(Preprocess((side, side)).std)[:, None, None]
    return (raw.float() / 255 - mean) / std


def needs_mmseg() -> None:
    """Skip the test if the framework is not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("mmseg", "mmengine", "mmcv")):
        pytest.skip("mmsegmentation is not installed: `make setup` installs it")


@contextmanager
def masked(model: nn.Module, slim: SlimCheckpoint, layout: Layout) -> Iterator[None]:
    """Set the units that ``slim`` cuts to zero in the dense model, in the layers that read them."""
    swapped = []
    for layer in slim.spec.layers:
        gone = torch.ones(layer.units, dtype=torch.bool)
        gone[slim.mask[layer.name]] = False
        read_by = [part.module for part in layer.slices if part.axis == "in"]
        for consumer in read_by or [f"{layer.name}.out_proj"]:
            module = model.get_submodule(str(layout.name(consumer)))
            weight = module._parameters["weight"]
            assert weight is not None
            zeroed = weight.detach().clone()
            zeroed[:, gone.repeat_interleave(layer.unit_width)] = 0
            module._parameters["weight"] = nn.Parameter(zeroed, requires_grad=False)
            swapped.append((module, weight))
    try:
        yield
    finally:
        for module, weight in swapped:
            module._parameters["weight"] = weight


def error(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the largest difference of every output, in standard deviations of ``wanted``."""
    return {k: float((found[k] - w).abs().max() / w.std()) for k, w in wanted.items()}


def in_framework(tower: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Return a tower's tensors by the framework's names and shapes."""
    found: dict[str, Tensor] = {}
    for canonical, tensor in tower.items():
        found |= layout.to_framework(canonical, tensor)
    return found


def put(model: nn.Module, tower: Mapping[str, Tensor], layout: Layout) -> None:
    """Load all tensors of the tower into a framework's model."""
    values = in_framework(tower, layout)
    missing, unexpected = model.load_state_dict(values, strict=False)
    assert not unexpected
    assert not [name for name in missing if layout.canonical(name) is not None]


def snapshot(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Return the identity and a copy of the value of every tensor."""
    state = model.state_dict(keep_vars=True)
    return {name: (id(tensor), tensor.detach().clone()) for name, tensor in state.items()}


def unchanged(model: nn.Module, before: Mapping[str, tuple[int, Tensor]]) -> bool:
    """Return True if every tensor is the same object with the same value as in a snapshot."""
    after = model.state_dict(keep_vars=True)
    return list(after) == list(before) and all(
        id(after[name]) == there and torch.equal(after[name].detach(), value)
        for name, (there, value) in before.items()
    )


SMALL = {"width": 32, "depth": 4, "heads": 4, "patch": 8, "size": 32, "outputs": 16}
SMALL_MLP = 64


def small_tower(seed: int = 0) -> dict[str, Tensor]:
    """Build a tower small enough for unit tests."""
    return lively_tower(**SMALL, mlp=SMALL_MLP, seed=seed)


def small_slim(
    tower: Mapping[str, Tensor] | None = None, *, seed: int = 0, **options: Any
) -> SlimCheckpoint:
    """Build a slim checkpoint of :func:`small_tower`, with a text tower of two tensors."""
    kept = random_kept(4, 4, SMALL_MLP, seed)
    text = {
        "token_embedding.weight": torch.full((6, 8), 0.25),
        "transformer.resblocks.0.mlp.c_fc.weight": torch.full((16, 8), 0.5),
        "logit_scale": torch.tensor(4.6),
    }
    return slim_by_hand(tower or small_tower(), kept, heads=4, size=32, **{"text": text, **options})


def lively_resnet(layers: list[int], *, width: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Draw the weights of open_clip's ModifiedResNet, with norms and their statistics."""
    from open_clip.modified_resnet import ModifiedResNet

    return lively(ModifiedResNet(layers, 24, 4, 64, width), seed).state_dict()


@torch.no_grad()
def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw values for every parameter and statistic of a network of convolutions and norms."""
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if name.endswith(("running_var", ".weight")) and tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5, generator=draw)
        elif tensor.ndim <= 1:
            tensor.normal_(0, 0.2, generator=draw)
        else:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=draw)
    return model.eval()


def slim_resnet(
    state: Mapping[str, Tensor], *, seed: int = 0, trained: bool = True
) -> SlimCheckpoint:
    """Build a slim ModifiedResNet that keeps some channels of every inner convolution."""
    draw = torch.Generator().manual_seed(seed)
    layers, mask = [], {}
    blocks = [
        name.removesuffix(".conv1.weight")
        for name in state
        if name.endswith(".conv1.weight") and name.startswith("layer")
    ]
    for block in blocks:
        for made, norm, read_by in (("conv1", "bn1", "conv2"), ("conv2", "bn2", "conv3")):
            name, units = f"{block}.{made}", state[f"{block}.{made}.weight"].shape[0]
            kept = torch.randperm(units, generator=draw)[: units // 2 + len(layers) % 3]
            mask[name] = kept.sort().values
            slices = (
                SliceSpec(name, "out"),
                SliceSpec(f"{block}.{norm}", "out"),
                SliceSpec(f"{block}.{read_by}", "in"),
            )
            layers.append(LayerSpec(name, "channels", block, units, len(kept), 1, slices))
    return _slim(state, layers, mask, trained, ("RN-by-hand", "open_clip-resnet", "relu"))


def lively_convnext(depths: tuple[int, ...] = (1, 1, 2, 1), *, seed: int = 0) -> dict[str, Tensor]:
    """Draw the weights of open_clip's ``TimmModel`` around timm's ConvNeXt."""
    from timm.models.convnext import ConvNeXt

    trunk = ConvNeXt(depths=depths, dims=(8, 16, 24, 32), num_classes=0)
    head = nn.ModuleDict({"proj": nn.Linear(32, 16, bias=False)})
    return lively(nn.ModuleDict({"trunk": trunk, "head": head}), seed).state_dict()


def slim_convnext(
    state: Mapping[str, Tensor], *, seed: int = 0, trained: bool = True
) -> SlimCheckpoint:
    """Build a slim ConvNeXt that keeps some hidden units of every block's MLP."""
    draw = torch.Generator().manual_seed(seed)
    layers, mask = [], {}
    blocks = [n for n in state if ".blocks." in n]  # the head may have an MLP of its own
    for made in [name for name in blocks if name.endswith(".mlp.fc1.weight")]:
        name, units = made.removesuffix(".fc1.weight"), state[made].shape[0]
        mask[name] = torch.randperm(units, generator=draw)[: units // 2 + len(layers)].sort().values
        slices = (SliceSpec(f"{name}.fc1", "out"), SliceSpec(f"{name}.fc2", "in"))
        block = name.removesuffix(".mlp")
        layers.append(LayerSpec(name, "mlp", block, units, len(mask[name]), 1, slices))
    return _slim(state, layers, mask, trained, ("ConvNeXt-by-hand", "open_clip-convnext", "gelu"))


def _slim(
    state: Mapping[str, Tensor],
    layers: list[LayerSpec],
    mask: dict[str, Tensor],
    trained: bool,
    says: tuple[str, str, str],
) -> SlimCheckpoint:
    """Build the slim checkpoint of a convolutional tower."""
    spec = SlimSpec(
        base=base_spec(says[0], "random", trained, state),
        family=says[1],
        library="open_clip_torch",
        library_version="3.3.0",
        architecture={"embed_dim": 24, "vision_cfg": {"image_size": 64, "width": 8}},
        activation=says[2],
        preprocess=Preprocess((64, 64)),
        layers=tuple(layers),
        protected=(),
        dense=Costs(2, 2),
        slim=Costs(1, 1),
    )
    tensors = {f"visual.{k}": v for k, v in cut_state(state, spec, mask).items()}
    return SlimCheckpoint(Path("slim/by-hand"), spec, mask, tensors)


def small_of_kind(kind: str, **options: Any) -> tuple[dict[str, Tensor], SlimCheckpoint, int]:
    """Return a small tower of a kind of ``KINDS``, a slim checkpoint of it, and its depth."""
    if kind == "resnet":
        tower = lively_resnet([1, 1, 1, 1])
        return tower, slim_resnet(tower, **options), 0
    if kind == "convnext":
        tower = lively_convnext()
        return tower, slim_convnext(tower, **options), 0
    assert kind == "vit", f"the contract's tests have no tower of the kind {kind}: add one here"
    tower = small_tower()
    return tower, small_slim(tower, **options), 4


def saved(slim: SlimCheckpoint, path: Path) -> Path:
    """Write a slim checkpoint by hand to disk."""
    return write(path, slim.spec, slim.tensors, slim.mask, card="# by hand\n")


class MiniSan(nn.Module):
    """Module tree with the names of MendelXu/SAN, built of open_clip's blocks."""

    def __init__(self, activation: str = "quick_gelu") -> None:
        super().__init__()
        from open_clip.transformer import QuickGELU, ResidualAttentionBlock

        layer = {"quick_gelu": QuickGELU, "gelu": nn.GELU}[activation]
        width, tokens = SMALL["width"], (SMALL["size"] // SMALL["patch"]) ** 2 + 1

        def blocks(count: int) -> nn.Sequential:
            made = [
                ResidualAttentionBlock(
                    width, 4, SMALL_MLP / width, act_layer=layer, batch_first=False
                )
                for _ in range(count)
            ]
            return nn.Sequential(*made)

        self.clip_visual_extractor = nn.Module()
        self.clip_visual_extractor.conv1 = nn.Conv2d(3, width, 8, 8, bias=False)
        self.clip_visual_extractor.class_embedding = nn.Parameter(torch.zeros(width))
        self.clip_visual_extractor.positional_embedding = nn.Parameter(torch.zeros(tokens, width))
        self.clip_visual_extractor.ln_pre = nn.LayerNorm(width)
        self.clip_visual_extractor.resblocks = blocks(3)
        self.clip_rec_head = nn.Module()
        self.clip_rec_head.resblocks = blocks(1)
        self.clip_rec_head.ln_post = nn.LayerNorm(width)
        self.clip_rec_head.proj = nn.Parameter(torch.zeros(width, SMALL["outputs"]))
        self.clip_rec_head.cross_attn = False
        self.side_adapter_network = nn.Linear(3, 5)
        self.ov_classifier = nn.Module()
        self.ov_classifier.logit_scale = nn.Parameter(torch.tensor(4.0))
        self.ov_classifier.bg_embed = nn.Parameter(torch.ones(1, 16))
        self.register_buffer("criterion_weight", torch.ones(4))

    @classmethod
    def with_tower(cls, tower: Mapping[str, Tensor], activation: str = "quick_gelu") -> MiniSan:
        """Build the model with the weights of ``tower``, and positions tuned by the framework."""
        torch.manual_seed(3)
        model = cls(activation)
        put(model, tower, TARGETS.get("san").layout(model.state_dict(), 4))
        with torch.no_grad():
            model.clip_visual_extractor.positional_embedding.add_(0.5)
        return model.eval()

    @torch.no_grad()
    def run(self, images: Tensor, bias: Tensor) -> Tensor:
        """Run extractor and head with an attention bias [B * heads, L, L] -> [B, outputs]."""
        front: Any = self.clip_visual_extractor
        x = front.conv1(images).flatten(2).permute(2, 0, 1)
        x = torch.cat([front.class_embedding.expand(1, x.shape[1], -1), x])
        x = front.ln_pre(x + front.positional_embedding[:, None])
        for block in front.resblocks:
            x = block(x)
        head: Any = self.clip_rec_head
        for block in head.resblocks:
            x = block(x, attn_mask=bias)
        return head.ln_post(x[0]) @ head.proj
