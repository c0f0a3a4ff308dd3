"""The shape of CLIP's residual network, from a slim checkpoint: tensors first, config second."""

from __future__ import annotations

from collections.abc import Iterable

from ovsprune.core.errors import CheckpointError
from ovsprune.slim.read import SlimCheckpoint
from ovsprune.slim.resnet import STRIDE, ModifiedResNet
from ovsprune.slim.shape import native_grid, vision_config

__all__ = ["build_modified_resnet"]


def build_modified_resnet(checkpoint: SlimCheckpoint) -> ModifiedResNet:
    """A tower of the widths of ``checkpoint``, without its weights.

    Widths come from the tensors; the attention pool's heads and the native size, which they cannot
    say, from ``architecture``: open_clip's model config, or its ``vision_cfg`` alone.

    Raises:
        CheckpointError: The tensors are not those of CLIP's residual network.
    """
    sizes = {name: tuple(tensor.shape) for name, tensor in checkpoint.tower().items()}
    try:
        stages: list[list[tuple[int, int]]] = []
        widths, shortcuts = [], set()
        for i in range(1, 1 + _count(sizes, "layer")):
            stages.append([])
            for j in range(_count(sizes, f"layer{i}.")):
                block = f"layer{i}.{j}"
                inner = (sizes[f"{block}.conv{k}.weight"][0] for k in (1, 2))
                stages[-1].append((next(inner), next(inner)))
                if f"{block}.downsample.0.weight" in sizes:
                    shortcuts.add(block)
            widths.append(sizes[f"layer{i}.0.conv3.weight"][0])
        first, second, third = (sizes[f"conv{k}.weight"][0] for k in (1, 2, 3))
        output, width = sizes["attnpool.c_proj.weight"]
        tokens = sizes["attnpool.positional_embedding"][0]
        heads = _heads(checkpoint, width)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: the tensors are not those of CLIP's residual network ({error}); "
            "copy or write the checkpoint again"
        ) from error
    return ModifiedResNet(
        stem=(first, second, third),
        stages=stages,
        widths=widths,
        shortcuts=frozenset(shortcuts),
        heads=heads,
        output_dim=output,
        grid_size=native_grid(checkpoint, (STRIDE, STRIDE), tokens - 1),
    )


def _count(names: Iterable[str], prefix: str) -> int:
    """How many numbers follow ``prefix`` in the names; they must be a row from 0 or 1 on."""
    found = {int(n[len(prefix) :].partition(".")[0]) for n in names if n.startswith(prefix)}
    if not found or found != set(range(min(found), min(found) + len(found))) or min(found) > 1:
        raise ValueError(f"{prefix}{sorted(found)}")
    return len(found)


def _heads(checkpoint: SlimCheckpoint, width: int) -> int:
    head_width = vision_config(checkpoint).get("head_width", 64)  # open_clip's default
    if not isinstance(head_width, int) or head_width < 1 or width % head_width:
        raise ValueError(f"head_width is {head_width!r}, which does not divide {width}")
    return width // head_width
