"""What frameworks have in common that split a CLIP ViT into an extractor and a recognition head.

The extractor runs the first blocks on the picture; the head runs the last ones with an attention
bias that a trained side adapter gives, one per head of the dense tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ovsprune.core.errors import TargetError
from ovsprune.slim import SlimCheckpoint
from ovsprune.targets.attached import Attached, attach_tower
from ovsprune.targets.check import (
    Weights,
    check_activation,
    check_directions,
    check_fits,
    check_heads,
    check_trained,
    choose_weights,
)
from ovsprune.targets.convert import Converted, convert_state
from ovsprune.targets.layout import POSITIONS, Layout, split_of

__all__ = ["PROTECTS", "Places", "attach", "check", "convert", "detect", "layout", "towers"]

PROTECTS: Mapping[str, str] = {
    POSITIONS: "the framework resizes and trains its positions, so its own are kept",
    "residual width": "the side adapter's fusion layers read the stream of four blocks",
    "projection": "mask embeddings are compared with text embeddings of the dense width",
    "depth": "features are read and blocks are split at fixed depths",
}


@dataclass(frozen=True)
class Places:
    """Where one framework keeps what; the fields are those of ``Layout``, and beside them:

    Attributes:
        framework: Its name in messages.
        activations: Paths of the MLP's activation, one of each stack.
        cross_attention: Path of the module whose ``cross_attn`` must be off where heads are cut.
    """

    framework: str
    front: str
    back: str
    front_parts: Mapping[str, str]
    back_parts: Mapping[str, str]
    stem: Mapping[str, str]
    text: Mapping[str, str]
    text_parts: Mapping[str, str]
    text_blocks: str
    activations: tuple[str, ...]
    cross_attention: str
    leading: Mapping[str, int] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()


def detect(model: nn.Module, places: Places) -> bool:
    """Whether ``model`` has both stacks of blocks."""
    return (
        split_of(dict.fromkeys(n for n, _ in model.named_modules()), *_stacks(places)) is not None
    )


def towers(model: nn.Module, places: Places) -> dict[str, str]:
    """Blocks to their paths.

    Raises:
        TargetError: ``model`` is something else.
    """
    split = split_of(dict.fromkeys(n for n, _ in model.named_modules()), *_stacks(places))
    if split is None:
        raise TargetError(_unknown(type(model).__name__, places))
    return {
        f"blocks 0-{split[0] - 1}": places.front,
        f"blocks {split[0]}-{split[1] - 1}": places.back,
    }


def layout(names: Mapping[str, object] | None, depth: int, places: Places) -> Layout:
    """Names in both directions; without ``names`` three quarters of the blocks are in front.

    Raises:
        TargetError: ``names`` are another framework's, or have another number of blocks.
    """
    front = depth * 3 // 4
    if names is not None:
        split = split_of(names, *_stacks(places))
        if split is None:
            raise TargetError(_unknown("the checkpoint", places))
        front, found = split
        if found != depth:
            raise TargetError(
                f"{places.framework} has {found} CLIP blocks here, the slim tower has {depth}; "
                "build the framework with the CLIP that was pruned, or prune the one it uses"
            )
    return Layout(
        front=places.front,
        back=places.back,
        split=front,
        depth=depth,
        front_parts=places.front_parts,
        back_parts=places.back_parts,
        stem=places.stem,
        leading=places.leading,
        transposed=places.transposed,
        text=places.text,
        text_parts=places.text_parts,
        text_blocks=places.text_blocks,
    )


def check(
    model: nn.Module, checkpoint: SlimCheckpoint, places: Places, weights: str, force: bool
) -> tuple[Weights, str]:
    """Ask everything before anything is touched; see ``Target.check``."""
    check_trained(checkpoint, force)
    check_directions(checkpoint)
    towers(model, places)
    names = model.state_dict()
    where = layout(names, depth_of(checkpoint), places)
    check_heads(model, checkpoint, where)
    state = where.tower_state(names)
    check_fits(state, checkpoint, f"this {type(model).__name__}")
    check_activation(model, checkpoint, places.activations)
    _check_cross_attention(model, checkpoint, where, places)
    return choose_weights(weights, state, checkpoint)


def attach(
    model: nn.Module,
    checkpoint: SlimCheckpoint,
    places: Places,
    choice: tuple[Weights, str],
    target: str,
    trainable: tuple[str, ...],
) -> Attached:
    """Put the slim tower into a model that was checked."""
    return attach_tower(
        model,
        checkpoint,
        layout(model.state_dict(), depth_of(checkpoint), places),
        choice,
        target=target,
        protected=PROTECTS,
        trainable=trainable,
    )


def convert(
    state: Mapping[str, Tensor] | None,
    checkpoint: SlimCheckpoint,
    places: Places,
    weights: str,
    force: bool,
) -> Converted:
    """A framework's saved state with the slim tower in it; see ``Target.convert``."""
    check_trained(checkpoint, force)
    check_directions(checkpoint)
    where = layout(state, depth_of(checkpoint), places)
    tower = None if state is None else where.tower_state(state)
    if tower is not None:
        check_fits(tower, checkpoint, "the checkpoint of the framework")
    return convert_state(state, checkpoint, where, choose_weights(weights, tower, checkpoint))


def depth_of(checkpoint: SlimCheckpoint) -> int:
    """Blocks of the slim tower.

    Raises:
        TargetError: It is no CLIP ViT.
    """
    prefix = "transformer.resblocks."
    names = [n[len(prefix) :] for n in checkpoint.tower() if n.startswith(prefix)]
    if not names:
        raise TargetError(
            f"{checkpoint.path} holds a {checkpoint.spec.family} tower "
            f"({checkpoint.spec.base.model}); this framework needs a CLIP vision transformer"
        )
    return 1 + max(int(name.partition(".")[0]) for name in names)


def _check_cross_attention(
    model: nn.Module, checkpoint: SlimCheckpoint, where: Layout, places: Places
) -> None:
    """SAN's cross-attention slices ``in_proj_weight`` at offsets of the dense width itself."""
    if not getattr(model.get_submodule(places.cross_attention), "cross_attn", False):
        return
    heads = [
        layer.name
        for layer in checkpoint.spec.layers
        if layer.kind == "heads" and layer.kept < layer.units
    ]
    cut = [name for name in heads if (where.name(name) or "").startswith(f"{places.back}.")]
    if cut:
        raise TargetError(
            f"{places.cross_attention} has cross_attn on, which slices the dense attention weights "
            f"itself, but the slim checkpoint cuts heads of {', '.join(cut)}; turn cross_attn off "
            "(the default), or prune again with those layers protected (--protect)"
        )


def _stacks(places: Places) -> tuple[str, str]:
    return places.front, places.back


def _unknown(given: str, places: Places) -> str:
    return (
        f"{given} is not {places.framework}: expected blocks under {places.front} and "
        f"{places.back}. Give the framework's own model (unwrapped: model.module), or another "
        "--target (`ovsprune targets` lists them)"
    )
