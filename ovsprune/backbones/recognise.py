"""Which of open_clip's models a state dict could be, told from its shapes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import Tensor

__all__ = ["recognise"]

State = Mapping[str, Tensor]


def recognise(state: State) -> tuple[str, ...]:
    """Names of open_clip's whose image tower has the shapes of the one in ``state``.

    Width, patch, depth, positions and so on of a VisionTransformer; width, layers and positions of
    a ModifiedResNet. Where the file has a text tower, it narrows the choice. Heads cannot be told.

    Args:
        state: Of a whole CLIP, of its image tower, or of a framework that holds one.

    Returns:
        The names, those with a text tower of their own first; empty if none can be told.
    """
    for prefix in _prefixes(state):
        found = _tower(state, prefix)
        names = [name for name, (tower, _) in _known().items() if found and tower == found]
        if names:
            text = _text(state, prefix.removesuffix("visual."))
            narrowed = [name for name in names if text and _known()[name][1] == text]
            return tuple(sorted(narrowed or names, key=lambda n: _known()[n][1] == ("hub",)))
    return ()


def _prefixes(state: State) -> list[str]:
    """Where a first convolution over RGB is."""
    own = "conv1.weight"
    return [
        name.removesuffix(own)
        for name, value in state.items()
        if f".{name}".endswith(f".{own}") and value.ndim == 4 and value.shape[1] == 3
    ]


def _tower(state: State, prefix: str) -> tuple[Any, ...] | None:
    """What the shapes say of the tower under ``prefix``; None if it is neither kind."""
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
    """Vocabulary, width and depth of the text tower; ``("hub",)`` for one of another library."""
    for place in (root, f"{root}text."):
        table = state.get(f"{place}token_embedding.weight")
        if table is not None:
            blocks = f"{place}transformer.resblocks."
            names = {name for name in state if name.startswith(blocks)}
            return (
                *table.shape,
                _count(names, blocks),
                root + "text_decoder.ln_final.bias" in state,
            )
    return ("hub",) if any(name.startswith(f"{root}text.") for name in state) else None


def _count(names: set[str], prefix: str) -> int:
    """Modules that are numbered behind ``prefix``."""
    return len({n[len(prefix) :].partition(".")[0] for n in names if n.startswith(prefix)})


@cache
def _known() -> dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]]:
    """open_clip's names to what the shapes of the image and of the text tower would say."""
    import open_clip
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    known = {}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        assert config is not None
        vision, text = CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"])
        if vision.timm_model_name is None:
            own = (text.vocab_size, text.width, text.layers, "multimodal_cfg" in config)
            tower = _of_config(vision, config["embed_dim"])
            known[name] = (tower, ("hub",) if text.hf_model_name else own)
    return known


def _of_config(vision: Any, embed_dim: int) -> tuple[Any, ...]:
    sides = vision.image_size
    height, width = sides if isinstance(sides, (tuple, list)) else (sides, sides)
    if isinstance(vision.layers, (tuple, list)):
        positions = (height // 32) * (width // 32) + 1
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
