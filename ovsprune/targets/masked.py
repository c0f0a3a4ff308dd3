"""Unstructured masks for the tower of a framework's model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ovsprune.masks import Applied, apply_masks
from ovsprune.targets.layout import count_blocks
from ovsprune.targets.registry import TARGETS

__all__ = ["mask_tower"]


def mask_tower(
    model: nn.Module, masks: Mapping[str, Tensor], target: str, *, hold: bool = False
) -> Applied:
    """Set weights of a framework's tower to zero where a mask of the CLIP tower is False.

    Works in place, like :func:`ovsprune.masks.apply_masks`, but for frameworks that rename layers,
    split the blocks into several stacks or store queries, keys and values separately.

    Args:
        model: The framework's live model with a dense tower.
        masks: Name in open_clip's tower to a bool tensor of the weight's shape, True where the
            weight is kept, as :func:`ovsprune.masks.read_masks` returns it. For a transformer,
            every block has at least one mask.
        target: Name of the target (``ovsprune targets`` lists them).
        hold: Mask the gradients too, so that training keeps the zeros.

    Returns:
        Record of the change. Masks of parts that the framework lacks are left out.

    Raises:
        TargetError: ``model`` belongs to another framework, or its tower has another shape;
            nothing was changed.
        UnknownNameError: There is no such target.
    """
    layout = TARGETS.get(target).layout(model.state_dict(), count_blocks(masks))
    renamed = {
        name: part
        for canonical, mask in masks.items()
        if layout.absent_reason(canonical) is None
        for name, part in layout.to_framework(canonical, mask).items()
    }
    # The names are those of the whole model now, so no prefix is added.
    return apply_masks(model, renamed, prefix="", hold=hold)
