"""Small member of every family, for contracts that hold whatever the weights are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from timm.models import register_model
from torch import nn

from ovsprune.backbones import FAMILIES
from ovsprune.calibration.pictures import RenderedPictures
from ovsprune.core.distillation import Distillation
from ovsprune.core.progress import Silent
from ovsprune.core.protocols import Backbone, PrunableLayer, RecoveryContext, Stages
from ovsprune.core.records import DenseModel, Group, Plan, Preprocess, StreamPoint
from ovsprune.graph.cut import cut
from ovsprune.graph.groups import find_groups
from tests.tiers import by_default


def open_clip_vit() -> Backbone:
    from ovsprune.backbones.open_clip_build import assemble
    from ovsprune.backbones.open_clip_model import build_clip
    from ovsprune.backbones.open_clip_source import other_tensors

    config = {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": 48,
            "layers": 3,
            "width": 64,
            "head_width": 16,
            "patch_size": 8,
            "mlp_ratio": 2.0,
        },
        "text_cfg": {
            "context_length": 8,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
    }
    model = build_clip(config)
    dense = DenseModel("small", config, Preprocess((48, 48)), text=other_tensors(model))
    return assemble("open_clip-vit", dense, model)


@register_model
def ovsprune_lite(pretrained: bool = False, **options: Any) -> nn.Module:
    """EfficientNet-Lite of six blocks, for timm's registry."""
    from timm.models import efficientnet

    blocks = [
        ["ds_r1_k3_s1_e1_c8"],
        ["ir_r2_k3_s2_e4_c12"],
        ["ir_r2_k5_s2_e4_c16"],
        ["ir_r1_k3_s1_e4_c24"],
    ]
    return efficientnet._create_effnet(  # type: ignore[no-any-return]
        "ovsprune_lite",
        pretrained,
        block_args=efficientnet.decode_arch_def(blocks),
        stem_size=8,
        num_features=32,
        pad_type="same",
        act_layer=nn.ReLU6,
        norm_layer=nn.BatchNorm2d,
        **options,
    )


LITE = {
    "embed_dim": 24,
    "vision_cfg": {"timm_model_name": "ovsprune_lite", "image_size": 48},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@cache
def _lite() -> dict[str, torch.Tensor]:
    from ovsprune.slim.timm_tower import build_timm_tower

    return uneven(build_timm_tower(LITE), 48)


def uneven(tower: nn.Module, side: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Convolutional tower's tensors with scales and statistics as uneven as a trained one's."""
    tower.train()
    generator = torch.Generator().manual_seed(seed)
    for module in tower.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.4, 1.6, generator=generator)
            module.bias.normal_(0, 0.3, generator=generator)
            module.momentum = None  # The mean over all batches.
    with torch.no_grad():
        for images in RenderedPictures(32, Preprocess((side, side)), 3).batches(16):
            tower(images)
    return tower.state_dict()


def open_clip_efficientnet() -> Backbone:
    """Convolutional tower: six blocks, of which five have channels of their own."""
    family = FAMILIES.get("open_clip-efficientnet")
    backbone = family.build(DenseModel("lite", LITE, Preprocess((48, 48))))
    backbone.tower.load_state_dict(_lite())
    return backbone


@register_model
def ovsprune_squeezed(pretrained: bool = False, **options: Any) -> nn.Module:
    """EfficientNet with squeeze-and-excitation, of five blocks."""
    from timm.models import efficientnet

    blocks = [
        ["ds_r1_k3_s1_e1_c8_se0.25"],
        ["ir_r2_k3_s2_e4_c12_se0.25"],
        ["ir_r2_k3_s2_e4_c16_se0.25"],
    ]
    return efficientnet._create_effnet(  # type: ignore[no-any-return]
        "ovsprune_squeezed",
        pretrained,
        block_args=efficientnet.decode_arch_def(blocks),
        stem_size=8,
        num_features=24,
        act_layer=nn.SiLU,
        norm_layer=nn.BatchNorm2d,
        **options,
    )


@register_model
def ovsprune_convnext(pretrained: bool = False, **options: Any) -> nn.Module:
    """ConvNeXt of five blocks; ``conv_mlp`` as in timm's small ones."""
    from timm.models import convnext

    given = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 20), "conv_mlp": False, **options}
    return convnext._create_convnext(  # type: ignore[no-any-return]
        "ovsprune_convnext", pretrained, **given
    )


@register_model
def ovsprune_convnext_conv(pretrained: bool = False, **options: Any) -> nn.Module:
    """ConvNeXt with 1x1 convolutions in the MLPs."""
    return ovsprune_convnext(pretrained, conv_mlp=True, **options)


@register_model
def ovsprune_eva(pretrained: bool = False, **options: Any) -> nn.Module:
    """EVA-02 of three blocks: rotary positions, a gate, norms inside attention and MLP."""
    from timm.models import eva

    given = {
        "img_size": 48,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 3,
        "num_heads": 3,
        "qkv_fused": False,
        "mlp_ratio": 2.0,
        "swiglu_mlp": True,
        "scale_mlp": True,
        "scale_attn_inner": True,
        "use_rot_pos_emb": True,
        "ref_feat_shape": (6, 6),
        "global_pool": "token",
        **options,
    }
    return eva._create_eva("ovsprune_eva", pretrained, **given)  # type: ignore[no-any-return]


@register_model
def ovsprune_siglip(pretrained: bool = False, **options: Any) -> nn.Module:
    """SigLIP of three blocks, with its attention pool."""
    from timm.models import vision_transformer

    given = {
        "img_size": 48,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 3,
        "num_heads": 3,
        "mlp_ratio": 2.0,
        "class_token": False,
        "act_layer": "gelu_tanh",
        "global_pool": "map",
        **options,
    }
    return vision_transformer._create_vision_transformer(  # type: ignore[no-any-return]
        "ovsprune_siglip", pretrained, **given
    )


@register_model
def ovsprune_vitamin(pretrained: bool = False, **options: Any) -> nn.Module:
    """ViTamin of two bottlenecks a stage and two blocks."""
    from timm.models import vitamin

    given = {
        "img_size": 64,
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 3,
        "mlp_layer": vitamin.GeGluMlp,
        "mlp_ratio": 2.0,
        "class_token": False,
        "global_pool": "avg",
        "embed_cfg": vitamin.VitCfg(embed_dim=(8, 12, 48), depths=(2, 2, 1), stem_width=8),
        **options,
    }
    return vitamin._create_vitamin("vitamin_small_224", pretrained, **given)  # type: ignore[no-any-return]


@register_model
def ovsprune_swin(pretrained: bool = False, **options: Any) -> nn.Module:
    """Swin Transformer of three stages: shifted windows with and without padding, and a whole."""
    from timm.models import swin_transformer

    given = {
        "img_size": 64,
        "patch_size": 4,
        "embed_dim": 24,
        "depths": (2, 2, 2),
        "num_heads": (3, 6, 6),
        "window_size": 5,
        "mlp_ratio": 2.0,
        **options,
    }
    return swin_transformer._create_swin_transformer(  # type: ignore[no-any-return]
        "swin_tiny_patch4_window7_224", pretrained, **given
    )


@register_model
def ovsprune_fastvit(pretrained: bool = False, **options: Any) -> nn.Module:
    """FastViT of four blocks as in MobileCLIP: two attend, after positions of their own."""
    from functools import partial

    from timm.models import fastvit

    given = {
        "layers": (1, 1, 2),
        "embed_dims": (8, 16, 96),
        "mlp_ratios": (4, 4, 3),
        "token_mixers": ("repmixer", "repmixer", "attention"),
        "se_downsamples": (False, False, True),
        "pos_embs": (None, None, partial(fastvit.RepConditionalPosEnc, spatial_shape=(7, 7))),
        "lkc_use_act": True,
        **options,
    }
    return fastvit._create_fastvit(  # type: ignore[no-any-return]
        "ovsprune_fastvit", pretrained, **given
    )


def of_timm(name: str, **vision: Any) -> dict[str, Any]:
    """open_clip's configuration of one of these."""
    return {**LITE, "vision_cfg": {**LITE["vision_cfg"], "timm_model_name": name, **vision}}


@cache
def _uneven(name: str, projection: str, pool: str) -> dict[str, torch.Tensor]:
    """Tower's state with every tensor away from what timm starts it with."""
    from ovsprune.slim.timm_tower import build_timm_tower

    tower = build_timm_tower(of_timm(name, timm_proj=projection, timm_pool=pool))
    generator = torch.Generator().manual_seed(0)

    def draw(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var") or (tensor.ndim == 1 and "weight" in name):
            return (0.3 * noise).exp()
        if name.endswith("gamma"):
            return 0.5 + 0.3 * noise
        return noise * (0.3 if tensor.ndim == 1 else tensor[0].numel() ** -0.5)

    return {key: draw(key, tensor) for key, tensor in tower.state_dict().items()}


def timm_backbone(
    family: str, name: str, size: int, projection: str = "linear", pool: str = "avg"
) -> Backbone:
    """Tower with uneven weights, for pictures of ``size`` pixels."""
    config = of_timm(name, timm_proj=projection, timm_pool=pool, image_size=size)
    backbone = FAMILIES.get(family).build(DenseModel(name, config, Preprocess((size, size))))
    backbone.tower.load_state_dict(_uneven(name, projection, pool))
    return backbone


def open_clip_convnext() -> Backbone:
    """ConvNeXt whose MLPs are matrices, with a projection of two layers."""
    return timm_backbone("open_clip-convnext", "ovsprune_convnext", 64, "mlp")


def open_clip_convnext_conv() -> Backbone:
    """ConvNeXt whose MLPs are 1x1 convolutions."""
    return timm_backbone("open_clip-convnext", "ovsprune_convnext_conv", 64)


@cache
def _fastvit() -> dict[str, torch.Tensor]:
    backbone = timm_backbone("open_clip-fastvit", "ovsprune_fastvit", 96, "")
    return uneven(backbone.tower, 96)


def open_clip_fastvit() -> Backbone:
    """FastViT: the projection is the trunk's own classifier, as in MobileCLIP."""
    backbone = timm_backbone("open_clip-fastvit", "ovsprune_fastvit", 96, "")
    backbone.tower.load_state_dict(_fastvit())
    return backbone


def squeezed() -> Backbone:
    """EfficientNet whose channels have two readers."""
    return timm_backbone("open_clip-efficientnet", "ovsprune_squeezed", 48)


def open_clip_timm_vit() -> Backbone:
    """EVA-02, in which a norm lies between units and consumer."""
    return timm_backbone("open_clip-timm-vit", "ovsprune_eva", 48, pool="token")


def open_clip_timm_siglip() -> Backbone:
    """SigLIP, whose pooled output comes from an attention pool with an MLP."""
    return timm_backbone("open_clip-timm-vit", "ovsprune_siglip", 48, "none", pool="map")


def open_clip_vitamin() -> Backbone:
    """ViTamin, whose tokens come from inverted bottlenecks."""
    return timm_backbone("open_clip-timm-vit", "ovsprune_vitamin", 64, pool="")


def open_clip_swin() -> Backbone:
    """Swin Transformer of three stages."""
    return timm_backbone("open_clip-swin", "ovsprune_swin", 64, pool="")


RESNET = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 64, "layers": [2, 1, 1, 1], "width": 8, "head_width": 64},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@cache
def _resnet() -> dict[str, torch.Tensor]:
    from ovsprune.backbones.open_clip_model import build_clip

    return uneven(build_clip(RESNET).get_submodule("visual"), 64, 1)


def open_clip_resnet() -> Backbone:
    """Residual network whose groups share a convolution: five bottlenecks, one without a path."""
    family = FAMILIES.get("open_clip-resnet")
    backbone = family.build(DenseModel("resnet", RESNET, Preprocess((64, 64))))
    backbone.tower.load_state_dict(_resnet())
    return backbone


class Sublayer(nn.Module):
    """MLP with a norm before its second layer, on a residual stream."""

    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        self.before, self.first = nn.LayerNorm(width), nn.Linear(width, units)
        self.norm, self.second = nn.LayerNorm(units), nn.Linear(units, width)
        nn.init.uniform_(self.norm.weight, 0.1, 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        read = self.norm(torch.nn.functional.gelu(self.first(self.before(x))))
        out: torch.Tensor = x + self.second(read)
        return out


class NormedTower(nn.Module):
    """Tower in which every group has a norm between its units and their consumer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 8, stride=8)
        self.blocks = nn.ModuleList(Sublayer(24, units) for units in (20, 36))
        self.project = nn.Linear(24, 16)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        stages = self.stages()
        stream = stages.stem(images)
        for block in stages.blocks.values():
            stream = block(stream)
        return stages.head(stream)[0]

    def stages(self) -> Stages:
        def head(stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            tokens = self.project(stream)
            side = round(tokens.shape[1] ** 0.5)
            return tokens.mean(1), tokens.transpose(1, 2).unflatten(2, (side, side))

        blocks = {f"blocks.{i}": block for i, block in enumerate(self.blocks)}
        return Stages(lambda x: self.patches(x).flatten(2).transpose(1, 2), blocks, head)

    def prunable_layers(self) -> list[PrunableLayer]:
        names = [f"blocks.{i}" for i in range(len(self.blocks))]
        return [
            PrunableLayer(f"{n}.mlp", "mlp", f"{n}.first", 1, n, StreamPoint(n, "output"))
            for n in names
        ]


class PatchBlock(nn.Module):
    """Two 3x3 convolutions with a norm between; the second has no residual where it strides."""

    def __init__(self, width: int, units: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, units, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(units)
        self.second = nn.Conv2d(units, width, 3, padding=1, stride=stride)
        nn.init.uniform_(self.norm.weight, 0.3, 1.5)
        nn.init.normal_(self.norm.bias, 0, 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.norm(self.first(x)).relu())
        return x + out if out.shape == x.shape else out


class PatchTower(nn.Module):
    """Tower whose consumers read patches of nine positions, and whose grid shrinks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks = nn.ModuleList(
            PatchBlock(8, units, stride) for units, stride in ((12, 1), (14, 2), (10, 1))
        )
        self.project = nn.Linear(8, 6)

    def stages(self) -> Stages:
        def head(stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            dense = self.project(stream.movedim(1, -1)).movedim(-1, 1)
            return dense.mean((2, 3)), dense

        return Stages(self.stem, {f"blocks.{i}": b for i, b in enumerate(self.blocks)}, head)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.stages().outputs(images)[0]

    def prunable_layers(self) -> list[PrunableLayer]:
        return [
            PrunableLayer(
                n, "channels", f"{n}.first", 1, n, None if i == 1 else StreamPoint(n, "output")
            )
            for i, n in enumerate(f"blocks.{i}" for i in range(len(self.blocks)))
        ]


def transformers_vit() -> Backbone:
    """SigLIP tower of transformers: three blocks and an attention pool."""
    from ovsprune.slim.transformers_build import describe_architecture
    from tests.backbones.hf_models import make

    family = FAMILIES.get("transformers-vit")
    more = {"image_size": 48, "num_hidden_layers": 3, "intermediate_size": 96}
    model = make("SiglipVisionModel", **more)
    architecture = describe_architecture("SiglipVisionModel", model.config.to_dict())
    preprocess = Preprocess((48, 48))
    backbone = family.build(DenseModel("siglip", architecture, preprocess))
    backbone.tower.load_state_dict(model.state_dict())
    return backbone


REPRESENTATIVES: dict[str, Callable[[], Backbone]] = {
    "open_clip-convnext": open_clip_convnext,
    "open_clip-efficientnet": open_clip_efficientnet,
    "open_clip-fastvit": open_clip_fastvit,
    "open_clip-resnet": open_clip_resnet,
    "open_clip-swin": open_clip_swin,
    "open_clip-timm-vit": open_clip_timm_vit,
    "open_clip-vit": open_clip_vit,
    "transformers-vit": transformers_vit,
}


MORE: dict[str, Callable[[], Backbone]] = {
    "open_clip-convnext: 1x1 convolutions": open_clip_convnext_conv,
    "open_clip-efficientnet: squeeze-and-excitation": squeezed,
    "open_clip-timm-vit: attention pool": open_clip_timm_siglip,
    "open_clip-timm-vit: inverted bottlenecks": open_clip_vitamin,
}
"""Towers of families that have another one above, of another kind inside."""


@dataclass
class Case:
    """Family's representative, rewritten, with its groups."""

    backbone: Backbone
    dense: nn.Module
    groups: list[Group]
    pictures: RenderedPictures
    results: dict[object, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.original = {k: v.clone() for k, v in self.dense.state_dict().items()}

    def once(self, key: object, compute: Callable[[], Any]) -> Any:
        """Return ``compute()``, computed at the first call with ``key`` and shared by all tests."""
        if key not in self.results:
            self.results[key] = compute()
        return self.results[key]

    def with_pictures(self, count: int) -> Case:
        """Return the same towers with ``count`` calibration images, and no shared results."""
        pictures = RenderedPictures(count, self.backbone.preprocess, 0)
        return replace(self, pictures=pictures, results={})

    def images(self, count: int = 4) -> torch.Tensor:
        return next(RenderedPictures(count, self.backbone.preprocess, 7).batches(count))

    def outputs(self, tower: nn.Module, images: torch.Tensor) -> torch.Tensor:
        stages = self.backbone.stages(tower)
        stream = stages.stem(images)
        for block in stages.blocks.values():
            stream = block(stream)
        pooled, dense = stages.head(stream)
        return torch.cat([pooled.flatten(), dense.flatten()])

    def context(
        self, slim: nn.Module, plan: Plan, batch_size: int = 5, **others: Any
    ) -> RecoveryContext:
        return RecoveryContext(
            self.dense,
            slim,
            self.backbone.stages,
            self.groups,
            plan,
            self.pictures,
            batch_size,
            1e-2,
            0,
            **{"progress": Silent(), "distill": Distillation(steps=4), **others},
        )

    def cut(self, plan: Plan) -> nn.Module:
        slim = deepcopy(self.dense)
        cut(slim, self.groups, plan)
        return slim

    def random_plan(self, seed: int, share: float = 0.5) -> Plan:
        generator = torch.Generator().manual_seed(seed)
        kept = {}
        for group in self.groups:
            width = max(1, round(share * group.units))
            order = torch.randperm(group.units, generator=generator)
            kept[group.name] = order[:width].sort().values
        return Plan(kept)

    def full_plan(self) -> Plan:
        return Plan({g.name: torch.arange(g.units) for g in self.groups})


def prepared(backbone: Backbone, pictures: int = 12) -> Case:
    """``backbone`` rewritten, with its groups and some pictures."""
    family = FAMILIES.get(backbone.family)
    dense = deepcopy(backbone.tower).eval().requires_grad_(False)
    family.rewrite(dense)
    seeds = [seed for seed in family.prunable_layers(dense) if not seed.protected]
    groups = find_groups(dense, seeds, backbone.preprocess.size)
    return Case(backbone, dense, groups, RenderedPictures(pictures, backbone.preprocess, 0))


def of_no_family(name: str, make: Callable[[], Any], activation: str) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = make().eval()
    backbone = Backbone(
        name=name,
        pretrained=None,
        trained=False,
        family="none",
        tower=tower,
        stages=lambda tower: tower.stages(),  # type: ignore[operator]
        preprocess=Preprocess((48, 48)),
        activation=activation,
        architecture={},
        library_version="0",
        text={},
    )
    groups = find_groups(tower, tower.prunable_layers(), (48, 48))
    tower.requires_grad_(False)
    return Case(backbone, deepcopy(tower), groups, RenderedPictures(12, backbone.preprocess, 0))


OF_NO_FAMILY: dict[str, Callable[[], Case]] = {
    # Every group has a norm.
    "normed": lambda: of_no_family("normed", NormedTower, "gelu"),
    # The consumers are 3x3 convolutions.
    "patches": lambda: of_no_family("patches", PatchTower, "relu"),
}
"""Small towers with properties that no representative of a family has."""


FAMILY_CASES = (*FAMILIES.names(), *MORE)
"""Names of the cases that are towers of a family."""


@cache
def case_of(name: str) -> Case:
    """Return the case called ``name``, built once per process. Tests must not change it."""
    make = OF_NO_FAMILY.get(name)
    return make() if make else prepared((REPRESENTATIVES | MORE)[name]())


def pairs(cases: Iterable[str], plugins: Iterable[str], everywhere: Collection[str]) -> list[Any]:
    """Parameters (case, plug-in): a representative selection by default, the rest marked slow.

    By default, plug-ins in ``everywhere`` run on the representative of every family, and every
    plug-in runs on the cases in :data:`THOROUGH`.
    """

    def is_default(case: str, plugin: str) -> bool:
        return case in THOROUGH or (plugin in everywhere and case in REPRESENTATIVES)

    return [
        pytest.param(
            (case, plugin),
            marks=() if is_default(case, plugin) else pytest.mark.slow,
            id=f"{case}-{plugin}",
        )
        for case in cases
        for plugin in plugins
    ]


THOROUGH = ("open_clip-vit", "open_clip-resnet", *OF_NO_FAMILY)
"""Cases on which every plug-in runs by default: transformer, residual network, norms, 3x3."""


@pytest.fixture(params=by_default(FAMILY_CASES, REPRESENTATIVES))
def case(request: pytest.FixtureRequest) -> Case:
    return case_of(request.param)


@pytest.fixture
def normed() -> Case:
    """Tower that is of no family, in which every group has a norm."""
    return case_of("normed")


@pytest.fixture
def patches() -> Case:
    """Tower that is of no family, whose consumers are 3x3 convolutions."""
    return case_of("patches")
