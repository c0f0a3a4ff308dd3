"""Small models with the names of frameworks that contain their own complete CLIP.

Only names, shapes, and who reads what are the frameworks'; everything is small and written here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsprune.targets import TARGETS
from tests.targets.by_hand import SMALL, SMALL_MLP, put

WIDTH, HEADS, SIZE, PATCH = SMALL["width"], SMALL["heads"], SMALL["size"], SMALL["patch"]


class QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ApartAttention(nn.Module):
    """Sequence-first attention with three separate weights and one bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.batch_first = width, heads, False
        self.register_parameter("in_proj_weight", None)
        for which in "qkv":
            weight = nn.Parameter(torch.randn(width, width) * width**-0.5)
            self.register_parameter(f"{which}_proj_weight", weight)
        self.in_proj_bias = nn.Parameter(torch.randn(3 * width) * 0.1)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        out, weights = F.multi_head_attention_forward(
            query, key, value, self.embed_dim, self.num_heads, None, self.in_proj_bias,
            None, None, False, 0.0, self.out_proj.weight, self.out_proj.bias,
            training=self.training, need_weights=need_weights, attn_mask=attn_mask,
            use_separate_proj_weight=True, q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight, v_proj_weight=self.v_proj_weight,
        )  # fmt: skip
        return out, weights


class UnnamedAttention(ApartAttention):
    """Variant whose ``forward`` does not name its arguments."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return super().forward(*args, **kwargs)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp: int, apart: bool) -> None:
        super().__init__()
        kind = UnnamedAttention if apart else nn.MultiheadAttention
        self.attn: Any = kind(width, heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, mlp))
        self.mlp.add_module("gelu", QuickGelu())
        self.mlp.add_module("c_proj", nn.Linear(mlp, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map [L, N, E] to [L, N, E]."""
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=None)[0]
        return x + self.mlp(self.ln_2(x))


class Blocks(nn.Module):
    def __init__(self, count: int, *shape: int, apart: bool) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*[Block(*shape, apart=apart) for _ in range(count)])


class Visual(nn.Module):
    """CLIP ViT: its parts, and the computation up to the first block."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        tokens = (SIZE // PATCH) ** 2 + 1
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn(tokens, WIDTH))
        self.proj = nn.Parameter(torch.randn(WIDTH, SMALL["outputs"]))
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.ln_pre = nn.LayerNorm(WIDTH)
        self.transformer = Blocks(SMALL["depth"], WIDTH, HEADS, SMALL_MLP, apart=apart)
        self.ln_post = nn.LayerNorm(WIDTH)

    def patches(self, images: Tensor) -> Tensor:
        """Return patch embeddings [N, tokens, E], without the class token."""
        return self.conv1(images).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]

    def stream(self, patches: Tensor) -> Tensor:
        """Return the input of the first block, [L, N, E]; positions are resized if necessary."""
        first = self.class_embedding.expand(len(patches), 1, -1)
        positions = self.positional_embedding
        side, own = round(patches.shape[1] ** 0.5), round((len(positions) - 1) ** 0.5)
        if side != own:
            grid = positions[1:].T.reshape(1, WIDTH, own, own)
            grid = F.interpolate(grid, (side, side), mode="bicubic").flatten(2)[0].T
            positions = torch.cat([positions[:1], grid])
        x = torch.cat([first, patches], dim=1) + positions
        return self.ln_pre(x).transpose(0, 1)  # type: ignore[no-any-return]


class MiniClip(nn.Module):
    """CLIP with OpenAI's names; ``apart`` gives it CAT-Seg's attention."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(6, 16))
        self.text_projection = nn.Parameter(torch.randn(16, SMALL["outputs"]))
        self.logit_scale = nn.Parameter(torch.tensor(4.0))
        self.visual = Visual(apart)
        self.transformer = Blocks(1, 16, 2, 32, apart=apart)
        self.token_embedding = nn.Embedding(10, 16)
        self.ln_final = nn.LayerNorm(16)

    def words(self) -> Tensor:
        """Return the embeddings of three texts, [3, D]."""
        tokens = torch.tensor([[1, 4, 9], [1, 7, 9], [1, 2, 9]])
        x = (self.token_embedding(tokens) + self.positional_embedding[:3]).transpose(0, 1)
        for block in self.transformer.resblocks:
            x = block(x)
        return self.ln_final(x[-1]) @ self.text_projection  # type: ignore[no-any-return]


class MiniCatSeg(nn.Module):
    """Small CAT-Seg: hooks read two residual streams; the last block computes values alone."""

    READ = (1, 2)

    def __init__(self) -> None:
        super().__init__()
        self.sem_seg_head = nn.Module()
        self.sem_seg_head.predictor = nn.Module()
        clip = MiniClip(apart=True)
        self.sem_seg_head.predictor.clip_model = clip
        self.sem_seg_head.predictor.transformer = nn.Linear(3, 3)
        self.upsample1 = nn.ConvTranspose2d(WIDTH, 4, 2, 2)
        self.upsample2 = nn.ConvTranspose2d(WIDTH, 2, 4, 4)
        self.clip_resolution = (48, 48)
        self.layers: list[Tensor] = []
        for index in self.READ:
            block = clip.visual.transformer.resblocks[index]
            block.register_forward_hook(lambda module, given, out: self.layers.append(out))
        for name, parameter in clip.named_parameters():
            tuned = "attn" in name and ("q_proj" in name or "v_proj" in name)
            parameter.requires_grad_(tuned)

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        images = torch.stack([each["image"] for each in batched_inputs])
        images = F.interpolate(images, self.clip_resolution, mode="bilinear")
        predictor: Any = self.sem_seg_head.predictor
        visual, self.layers = predictor.clip_model.visual, []
        x = visual.stream(visual.patches(images))
        *blocks, last = visual.transformer.resblocks
        for block in blocks:
            x = block(x)
        attn, y = last.attn, last.ln_1(x)
        weights = torch.cat([attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight])
        assert attn.in_proj_weight is None
        values = F.linear(y, weights, attn.in_proj_bias).chunk(3, dim=-1)[2]
        x = x[:1] + F.linear(values, attn.out_proj.weight, attn.out_proj.bias)
        x = x + last.mlp(last.ln_2(x))
        dense = visual.ln_post(x[1:].transpose(0, 1)) @ visual.proj
        words = predictor.clip_model.words()
        cost = F.normalize(dense, dim=-1) @ F.normalize(words, dim=-1).T
        maps = [layer[1:].permute(1, 2, 0).unflatten(2, (6, 6)) for layer in self.layers]
        return {
            "cost": predictor.transformer(cost),
            "up1": self.upsample1(maps[0]),
            "up2": self.upsample2(maps[1]),
        }


class MiniOvSeg(nn.Module):
    """Small OVSeg: mask prompts replace tokens of regions before and between blocks."""

    DEPTH = 3

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 3, 1)
        self.sem_seg_head = nn.Module()
        self.sem_seg_head.predictor = nn.Linear(3, 3)
        self.sem_seg_head.pixel_decoder = nn.Linear(3, 3)
        self.clip_adapter = nn.Module()
        clip = MiniClip(apart=False)
        grid = (SIZE // PATCH) ** 2
        clip.visual.mask_embedding = nn.Parameter(torch.randn(self.DEPTH, grid, WIDTH))
        self.clip_adapter.clip_model = clip.requires_grad_(False)
        self.clip_adapter.non_object_embedding = nn.Parameter(torch.randn(1, SMALL["outputs"]))

    def forward(self, regions: Tensor, masks: Tensor | None = None) -> dict[str, Tensor]:
        """Classify regions [N, 3, H, W] with masks [N, H, W], 1 inside the region."""
        adapter: Any = self.clip_adapter
        visual = adapter.clip_model.visual
        prompts, patches = visual.mask_embedding, visual.patches(regions)
        inside = None
        if masks is not None:
            inside = F.max_pool2d(masks[:, None], PATCH).flatten(2).transpose(1, 2)
            patches = patches * inside + prompts[0] * (1 - inside)
        x = visual.stream(patches)
        for depth, block in enumerate(visual.transformer.resblocks, start=1):
            x = block(x)
            if inside is not None and depth < len(prompts):
                shown = inside.transpose(0, 1)
                rest = x[1:] * shown + prompts[depth][:, None] * (1 - shown)
                x = torch.cat([x[:1], rest])
        embedding = visual.ln_post(x[0]) @ visual.proj
        words = torch.cat([adapter.clip_model.words(), adapter.non_object_embedding])
        similar = F.normalize(embedding, dim=-1) @ F.normalize(words, dim=-1).T
        return {"classes": 100 * similar, "embedding": embedding}


def with_tower(kind: type[nn.Module], target: str, tower: Mapping[str, Tensor]) -> Any:
    """Build a small framework with the weights of ``tower``; all parameters differ."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(11)
        model = kind()
        for parameter in model.parameters():
            if parameter.ndim == 1:  # torch starts norms and biases alike
                parameter.add_(torch.randn_like(parameter) * 0.1)
    put(model, tower, TARGETS.get(target).layout(model.state_dict(), SMALL["depth"]))
    return model.eval()
