"""Apply masks to a module's own weights, in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ovsprune.core.errors import TargetError
from ovsprune.masks.names import Placement, match

__all__ = ["Applied", "apply_masks", "zero"]


@dataclass(frozen=True, eq=False)
class Applied:
    """Result of :func:`apply_masks`.

    Attributes:
        placement: Parameter of each mask, and the masks without one.
        weights: Number of weights under the masks.
        zeros: Number of them that are zero now.
        held: Parameters whose gradient is masked until :meth:`release`.
        masks: Parameter's name in the module to its mask, bool of its shape.
    """

    placement: Placement
    weights: int
    zeros: int
    held: tuple[str, ...] = ()
    masks: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    _hooks: tuple[RemovableHandle, ...] = field(default=(), repr=False)

    @property
    def sparsity(self) -> float:
        """Fraction of the weights under the masks that is zero, in [0, 1]."""
        return self.zeros / self.weights if self.weights else 0.0

    def release(self) -> None:
        """Remove the masks from the gradients; the weights stay as they are."""
        for hook in self._hooks:
            hook.remove()


@torch.no_grad()
def apply_masks(
    module: nn.Module,
    masks: Mapping[str, Tensor],
    *,
    prefix: str | None = None,
    strict: bool = True,
    hold: bool = False,
) -> Applied:
    """Set a module's weights to zero, in place, where a mask is False.

    The masks of one checkpoint may go on another's weights, and on a tower inside a framework's
    model: names are matched as :func:`ovsprune.masks.match` says.

    Args:
        module: A tower, or a model that holds one.
        masks: Name to bool of the weight's shape, True where the weight stays.
        prefix: The tower's dotted name in ``module``, where several would do.
        strict: Refuse unless every mask has a parameter; otherwise apply those that have one, and
            list the others in ``placement``.
        hold: Mask the gradients too, so that training with any of torch's optimisers keeps the
            zeros (their state must be fresh). Parameters that need no gradient are left out: call
            this after a framework has frozen and thawed its parameters.

    Raises:
        TargetError: Masks and parameters do not fit; nothing was changed.
    """
    placement = match(module, masks, prefix)
    if strict and (placement.missing or placement.shapes):
        raise TargetError(
            f"the masks do not fit {type(module).__name__}: {placement}. Give a model of the "
            "architecture that they were made for, or strict=False to apply those that fit"
        )
    parameters = dict(module.named_parameters(remove_duplicate=False))
    placed = {target: masks[name] for name, target in placement.names.items()}
    zero(parameters, placed)
    held = tuple(name for name in placed if hold and parameters[name].requires_grad)
    hooks = tuple(_hold(parameters[name], placed[name]) for name in held)
    return Applied(
        placement=placement,
        weights=sum(mask.numel() for mask in placed.values()),
        zeros=sum(int((parameters[name] == 0).sum()) for name in placed),
        held=held,
        masks=placed,
        _hooks=hooks,
    )


@torch.no_grad()
def zero(parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set ``parameters`` to zero, in place, where the mask of that name is False."""
    for name, mask in masks.items():
        # not a product, which would leave what is not a number
        parameters[name].masked_fill_(~mask.to(parameters[name].device), 0.0)


def _hold(parameter: Tensor, mask: Tensor) -> RemovableHandle:
    kept = mask.to(parameter.device)
    handle: RemovableHandle = parameter.register_hook(  # type: ignore[no-untyped-call]
        lambda gradient: gradient * kept
    )
    return handle
