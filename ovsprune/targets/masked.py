"""Unstructured masks on the tower of a framework's model, whatever names it gives the layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ovsprune.masks import Applied, apply_masks
from ovsprune.targets.layout import block_number

__all__ = ["mask_tower"]


def mask_tower(
    model: nn.Module, masks: Mapping[str, Tensor], target: str, *, hold: bool = False
) -> Applied:
    """Set weights of a framework's tower to zero, where a mask of the CLIP tower is False.

    In place, as :func:`ovsprune.masks.apply_masks`, but for frameworks that rename layers, count
    blocks in several stacks or keep queries, keys and values apart.

    Args:
        model: The framework's live model, its tower dense.
        masks: Name in open_clip's tower to bool of the weight's shape, True where the weight
            stays: :func:`ovsprune.masks.read_masks`. Of a transformer, every block has one.
        target: Name of the framework: ``ovsprune targets``.
        hold: Mask the gradients too, so that training keeps the zeros.

    Returns:
        Result. Masks of parts that the framework lacks are left out.

    Raises:
        TargetError: ``model`` is not this framework's, or its tower is of another shape; nothing
            was changed.
        UnknownNameError: There is no such target.
    """
    from ovsprune.targets import TARGETS

    layout = TARGETS.get(target).layout(model.state_dict(), _depth(masks))
    placed = {
        name: part
        for canonical, mask in masks.items()
        if layout.absent_reason(canonical) is None
        for name, part in layout.to_framework(canonical, mask).items()
    }
    return apply_masks(model, placed, prefix="", hold=hold)


def _depth(names: Iterable[str]) -> int:
    """Blocks of the tower that the names are of; 0 of one without."""
    return max((block_number(name) + 1 for name in names), default=0)
