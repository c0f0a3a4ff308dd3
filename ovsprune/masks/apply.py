"""Applies masks to the current weights of a module."""

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
        placement: Assignment of masks to parameters, with the masks that have none.
        weights: Number of weights under the masks.
        zeros: Number of these weights that are zero now.
        held: Parameters whose gradient is masked until :meth:`release`.
        masks: Map of parameter name in the module to its mask, bool with the parameter's shape.
    """

    placement: Placement
    weights: int
    zeros: int
    held: tuple[str, ...] = ()
    masks: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    _hooks: tuple[RemovableHandle, ...] = field(default=(), repr=False)

    @property
    def sparsity(self) -> float:
        """Fraction of the weights under the masks that are zero, in [0, 1]."""
        return self.zeros / self.weights if self.weights else 0.0

    def release(self) -> None:
        """Stop masking gradients; the weights are not changed."""
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
    """Set the masked weights of a module to zero, in place.

    The masks may come from another checkpoint of the architecture, and the tower may be part of a
    framework's model. Names are matched by :func:`ovsprune.masks.match`.

    Args:
        module: A tower, or a model that contains one.
        masks: Map of name to bool with the weight's shape, True where the weight is kept.
        prefix: Dotted name of the tower in ``module``, if several towers match.
        strict: Refuse unless every mask has its parameter. Otherwise apply the masks that have one,
            and list the others in ``placement``.
        hold: Also mask the gradients, so that training with any optimiser of torch keeps the zeros
            (the optimiser must be new). Parameters without ``requires_grad`` are skipped: call
            this after the framework has set it.

    Raises:
        TargetError: Masks and parameters do not match; nothing was changed.
    """
    placement = match(module, masks, prefix)
    if strict and (placement.missing or placement.shapes):
        raise TargetError(
            f"the masks do not fit {type(module).__name__}: {placement}. Give a model of the "
            "architecture that they were made for, or pass strict=False to apply those that fit"
        )
    # Shared parameters have several names; a mask may use any of them.
    parameters = dict(module.named_parameters(remove_duplicate=False))
    placed = {target: masks[name] for name, target in placement.names.items()}
    zero(parameters, placed)
    # register_hook raises for a tensor without requires_grad.
    held = tuple(name for name in placed if hold and parameters[name].requires_grad)
    return Applied(
        placement=placement,
        weights=sum(mask.numel() for mask in placed.values()),
        zeros=sum(int((parameters[name] == 0).sum()) for name in placed),
        held=held,
        masks=placed,
        _hooks=tuple(_mask_gradient(parameters[name], placed[name]) for name in held),
    )


@torch.no_grad()
def zero(parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set ``parameters`` to zero, in place, where the mask of the same name is False."""
    for name, mask in masks.items():
        # A product would keep nan and infinity at masked positions.
        parameters[name].masked_fill_(~mask.to(parameters[name].device), 0.0)


def _mask_gradient(parameter: Tensor, mask: Tensor) -> RemovableHandle:
    """Register a hook that multiplies the gradient by the mask."""
    # Without a gradient, weight decay and new momentum keep a weight at zero.
    mask = mask.to(parameter.device)
    handle: RemovableHandle = parameter.register_hook(  # type: ignore[no-untyped-call]
        lambda gradient: gradient * mask
    )
    return handle
