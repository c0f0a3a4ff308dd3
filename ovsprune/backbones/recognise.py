"""Guess from the shapes of a state dict which of open_clip's models it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor

__all__ = ["recognise"]

State = Mapping[str, Tensor]


def recognise(state: State) -> tuple[str, ...]:
    """Return the models of open_clip whose image tower has the shapes of the one in ``state``.

    Compared are width, patch size, depth and positions of a VisionTransformer, or width, layers and
    positions of a ModifiedResNet, and the text tower if there is one. Shapes do not determine the
    number of heads.

    Args:
        state: State dict of a CLIP, of its image tower, or of a framework that contains one.

    Returns:
        Names of open_clip, those with a text tower of open_clip first; empty if none fits.
    """
    for prefix in _prefixes(state):
        shapes = _tower(state, prefix)
        names = [name for name, (tower, _) in _known().items() if shapes and tower == shapes]
        if names:
            text = _text(state, prefix.removesuffix("visual."))
            narrowed = [name for name in names if text and _known()[name][1] == text]
            return tuple(sorted(narrowed or names, key=lambda n: _known()[n][1] == ("hub",)))
    return ()


def _prefixes(state: State) -> list[str]:
    """Return the prefixes of all convolutions over RGB that are called ``conv1``."""
    first = "conv1.weight"  # [width, 3, patch, patch]
    return [
        name.removesuffix(first)
        for name, value in state.items()
        if f".{name}".endswith(f".{first}") and value.ndim == 4 and value.shape[1] == 3
    ]


def _tower(state: State, prefix: str) -> tuple[Any, ...] | None:
    """Return the sizes of the tower under ``prefix``; None if it is neither ViT nor ResNet."""
    names = {name.removeprefix(prefix) for name in state if name.startswith(prefix)}

    def size(name: str, axis: int) -> int | None:
        value = state.get(prefix + name)
        return None if value is None or value.ndim <= axis else value.shape[axis]

    if "class_embedding" in names:
        return (
            "vit",
            size("conv1.weight", 0),
            size("conv1.weight", 3),
            _count(names, "transformer.resblocks."),
            size("positional_embedding", 0),
            size("transformer.resblocks.0.mlp.c_fc.weight", 0),
            size("proj", 1),
            "ln_pre.weight" in names,
            "transformer.resblocks.0.ls_1.gamma" in names,
            "attn_pool.query" in names,
        )
    if "layer1.0.conv1.weight" in names:
        return (
            "resnet",
            size("layer1.0.conv1.weight", 0),
            tuple(_count(names, f"layer{stage}.") for stage in (1, 2, 3, 4)),
            size("attnpool.positional_embedding", 0),
            size("attnpool.c_proj.weight", 0),
        )
    return None


def _text(state: State, root: str) -> tuple[Any, ...] | None:
    """Return the sizes of the text tower; ``("hub",)`` for one of another library."""
    for prefix in (root, f"{root}text."):
        table = state.get(f"{prefix}token_embedding.weight")  # [vocabulary, width]
        if table is not None:
            blocks = f"{prefix}transformer.resblocks."
            names = {name for name in state if name.startswith(blocks)}
            return (
                *table.shape,
                _count(names, blocks),
                root + "text_decoder.ln_final.bias" in state,  # CoCa
            )
    return ("hub",) if any(name.startswith(f"{root}text.") for name in state) else None


def _count(names: set[str], prefix: str) -> int:
    """Count the numbered modules under ``prefix``."""
    return len({n[len(prefix) :].partition(".")[0] for n in names if n.startswith(prefix)})


@cache
def _known() -> dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """Map open_clip's names to the sizes of image tower and text tower."""
    import open_clip
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    known = {}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        assert config is not None
        vision, text = CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"])
        if vision.timm_model_name is None:
            sizes = (text.vocab_size, text.width, text.layers, "multimodal_cfg" in config)
            tower = _tower_of_config(vision, config["embed_dim"])
            known[name] = (tower, ("hub",) if text.hf_model_name else sizes)
    return known


def _tower_of_config(vision: Any, embed_dim: int) -> tuple[Any, ...]:
    """Return the sizes as :func:`_tower` does, in the same order."""
    sides = vision.image_size
    height, width = sides if isinstance(sides, (tuple, list)) else (sides, sides)
    if isinstance(vision.layers, (tuple, list)):
        positions = (height // 32) * (width // 32) + 1  # total stride 32, and the mean token
        return ("resnet", vision.width, tuple(vision.layers), positions, embed_dim)
    return (
        "vit",
        vision.width,
        vision.patch_size,
        vision.layers,
        (height // vision.patch_size) * (width // vision.patch_size) + 1,
        int(vision.width * vision.mlp_ratio),
        embed_dim,
        not vision.no_ln_pre,
        vision.ls_init_value is not None,
        bool(vision.attentional_pool),
    )
