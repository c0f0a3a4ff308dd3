"""Build CLIP's residual network with the widths of a slim checkpoint.

Widths are read from the tensors; the config gives only what tensor shapes do not determine.
"""

from __future__ import annotations

from collections.abc import Iterable

from ovsprune.core.errors import CheckpointError
from ovsprune.slim.read import SlimCheckpoint
from ovsprune.slim.resnet import STRIDE, ModifiedResNet
from ovsprune.slim.shape import head_width, native_grid

__all__ = ["build_modified_resnet"]


def build_modified_resnet(checkpoint: SlimCheckpoint) -> ModifiedResNet:
    """Build a tower with the layer widths of ``checkpoint``, without its weights.

    Widths come from the tensor shapes. The heads of the attention pool and the native size come
    from ``architecture`` in the config: open_clip's model config, or only its ``vision_cfg``.

    Raises:
        CheckpointError: The tensors do not form CLIP's residual network, or the config does not
            fit them.
    """
    sizes = {name: tuple(tensor.shape) for name, tensor in checkpoint.tower().items()}
    try:
        stages: list[list[tuple[int, int]]] = []
        widths, shortcuts = [], set()
        for i in range(1, 1 + _count(sizes, "layer")):
            stages.append([])
            for j in range(_count(sizes, f"layer{i}.")):
                block = f"layer{i}.{j}"
                conv1, conv2 = (sizes[f"{block}.conv{k}.weight"][0] for k in (1, 2))
                stages[-1].append((conv1, conv2))
                # The first block of a stage changes width or stride, so its shortcut is a layer.
                if f"{block}.downsample.0.weight" in sizes:
                    shortcuts.add(block)
            # conv3 writes the residual stream, which all blocks of a stage share.
            widths.append(sizes[f"layer{i}.0.conv3.weight"][0])
        first, second, third = (sizes[f"conv{k}.weight"][0] for k in (1, 2, 3))
        output, width = sizes["attnpool.c_proj.weight"]
        # with the mean token at the front, which is subtracted below
        tokens = sizes["attnpool.positional_embedding"][0]
        heads, rest = divmod(width, head_width(checkpoint))
        if rest:
            raise ValueError(
                f"head_width is {head_width(checkpoint)}, which does not divide {width}"
            )
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: the tensors do not form CLIP's residual network ({error}); copy "
            "the checkpoint again, or write it again from the pruned model"
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
    """Count the numbers after ``prefix`` in the names; they must be consecutive, from 0 or 1."""
    numbers = {int(n[len(prefix) :].partition(".")[0]) for n in names if n.startswith(prefix)}
    start = min(numbers, default=0)
    if not numbers or numbers != set(range(start, start + len(numbers))) or start > 1:
        raise ValueError(f"{prefix}{sorted(numbers)}")
    return len(numbers)
