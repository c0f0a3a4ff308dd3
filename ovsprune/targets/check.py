"""Checks that a slim checkpoint fits a framework, made before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ovsprune.core.errors import OptionError, TargetError
from ovsprune.slim import SlimCheckpoint
from ovsprune.slim.hashing import match
from ovsprune.targets.layout import POSITIONS, Layout
from ovsprune.targets.surgery import dense_shapes

__all__ = [
    "Weights",
    "check_activation",
    "check_fits",
    "check_heads",
    "check_trained",
    "choose_weights",
]

Weights = Literal["slim", "target"]

_COUNTERS = "num_batches_tracked"  # which some norms have and some have not, and nobody reads


def check_trained(checkpoint: SlimCheckpoint, force: bool) -> None:
    """Refuse a checkpoint whose base had random weights.

    Raises:
        TargetError: It had, and ``force`` is false.
    """
    if not checkpoint.spec.base.trained and not force:
        raise TargetError(
            f"{checkpoint.path} was pruned from {checkpoint.spec.base.model} with random weights "
            "(--pretrained none), so its mask and tensors mean nothing; prune trained weights, or "
            "transfer it all the same with --force (force=True)"
        )


def check_fits(
    state: Mapping[str, Tensor], checkpoint: SlimCheckpoint, layout: Layout, where: str
) -> None:
    """Compare the dense shapes of the slim tower's base with the framework's tower.

    Args:
        state: The framework's tower by canonical name and shape.
        checkpoint: The slim checkpoint.
        layout: Places of the tower's parts.
        where: Name of the framework's model in messages.

    Raises:
        TargetError: A tensor is missing, is slim already, or has another shape.
    """
    base = checkpoint.spec.base.model
    wanted = {n: s for n, s in dense_shapes(checkpoint).items() if layout.absent_reason(n) is None}
    slim = {name: tuple(tensor.shape) for name, tensor in checkpoint.tower().items()}
    missing = sorted(name for name in set(wanted) - set(state) if not name.endswith(_COUNTERS))
    extra = sorted(name for name in set(state) - set(wanted) if not name.endswith(_COUNTERS))
    if missing or extra:
        side, names = ("lacks", missing) if missing else ("also has", extra)
        raise TargetError(
            f"{where} is not built on {base}: it {side} {', '.join(names[:4])}"
            f"{', ...' if len(names) > 4 else ''}; build the framework with the CLIP that was "
            "pruned, or prune the one that the framework uses"
        )
    for name, shape in wanted.items():
        if name not in state:
            continue
        found = tuple(state[name].shape)
        if name in layout.stays:
            found, shape = found[-1:], shape[-1:]  # the framework may have another grid
        if found == shape:
            continue
        if found == slim[name]:
            raise TargetError(f"{where} is slim already ({name} is {found}); give the dense one")
        if name == POSITIONS and found[1:] == shape[1:]:
            raise TargetError(
                f"{where} has {found[0] - 1} patch positions, the base of {checkpoint.path} has "
                f"{shape[0] - 1}: it was built for another resolution; prune the CLIP of its own"
            )
        raise TargetError(
            f"{where} is not built on {base}: its {name} has shape {found}, expected {shape}; "
            "build the framework with the CLIP that was pruned, or prune the one it uses"
        )


def check_heads(model: nn.Module, checkpoint: SlimCheckpoint, layout: Layout) -> None:
    """Compare head counts of the attention modules that will be replaced.

    Raises:
        TargetError: A module is slim already, or splits its width in other heads.
    """
    for layer in checkpoint.spec.layers:
        path = layout.name(layer.name)
        if not layer.whole or path is None or layer.kept == layer.units:
            continue
        module = model.get_submodule(path)
        if hasattr(module, "kept_heads"):
            raise TargetError(f"{path} is slim already; detach first, or build the model anew")
        found = getattr(module, "num_heads", None)
        if found != layer.units:
            raise TargetError(
                f"{path} has {found} heads, the base of {checkpoint.path} has {layer.units}; "
                "build the framework with the CLIP that was pruned"
            )


def check_activation(model: nn.Module, checkpoint: SlimCheckpoint, paths: tuple[str, ...]) -> None:
    """Compare the MLP's activation with the one that was pruned, by its values.

    Frameworks register activations of their own, so the class name is not enough.

    Args:
        model: The framework's model.
        checkpoint: The slim checkpoint.
        paths: Activation modules of the framework, one of each stack.

    Raises:
        TargetError: It is another function.
    """
    probe = torch.linspace(-4, 4, 97)
    known = {
        "quick_gelu": probe * torch.sigmoid(1.702 * probe),
        "gelu": functional.gelu(probe),
        "gelu_tanh": functional.gelu(probe, approximate="tanh"),
        "relu": functional.relu(probe),
    }
    wanted = checkpoint.spec.activation
    for path in paths:
        with torch.no_grad():
            found = model.get_submodule(path)(probe.clone())
        if wanted in known and torch.allclose(found, known[wanted], atol=1e-6):
            continue
        name = next((k for k, v in known.items() if torch.allclose(found, v, atol=1e-6)), "another")
        raise TargetError(
            f"{path} is {name}, but {checkpoint.path} was pruned with {wanted}; build the "
            f"framework with {wanted} (OpenAI's CLIP weights are quick_gelu), or prune with "
            f"--activation {name}"
        )


def choose_weights(
    asked: str,
    state: Mapping[str, Tensor] | None,
    checkpoint: SlimCheckpoint,
    layout: Layout,
    mask_only: str = "",
) -> tuple[Weights, str]:
    """Choose the weights of the slim tower, and give the reason.

    ``auto`` takes the slim weights where the framework uses the frozen base CLIP, told tensor by
    tensor by the base's hashes, and the framework's own, cut by the mask, where it tuned them.
    What stays the framework's anyway (positions that it resizes and trains) does not count, nor
    what it does not have.

    Args:
        asked: ``"slim"``, ``"target"`` or ``"auto"``.
        state: The framework's tower by canonical name; None if there is none.
        checkpoint: The slim checkpoint.
        layout: Places of the tower's parts.
        mask_only: Reason why the framework can take the mask alone; empty if it can take weights.

    Raises:
        OptionError: ``asked`` is none of slim, target and auto.
        TargetError: ``target`` was asked for and there is nothing of the framework's to cut, or
            ``slim`` and the framework can take the mask alone.
    """
    if asked not in ("slim", "target", "auto"):
        raise OptionError(f"weights is {asked!r}, expected 'slim', 'target' or 'auto'")
    if mask_only and asked == "slim":
        raise TargetError(
            f"only the mask carries over: {mask_only}; let the framework's own weights be cut "
            "(--weights target, or auto)"
        )
    if state is None:
        if asked == "target" or mask_only:
            raise TargetError(
                "weights=target cuts the framework's own weights, but no checkpoint of it was "
                "given; give one (--checkpoint FILE)"
                + ("" if mask_only else " or take the slim weights (--weights slim)")
            )
        return "slim", "no checkpoint of the framework was given"
    if asked != "auto":
        return ("slim" if asked == "slim" else "target"), "as asked"
    if mask_only:
        return "target", f"only the mask carries over: {mask_only}"
    compared = match(state, checkpoint.spec.base)
    compared = {
        name: verdict
        for name, verdict in compared.items()
        if name not in layout.stays and layout.absent_reason(name) is None
    }
    other = sorted(
        name for name, verdict in compared.items() if verdict not in ("equal", "equal-after-half")
    )
    if not other:
        return "slim", f"all {len(compared)} tensors of the framework's tower are the base's"
    return "target", (
        f"{len(other)} of {len(compared)} tensors of the framework's tower differ from the base's "
        f"({', '.join(other[:2])}, ...): it tuned its CLIP, so its own weights are cut by the "
        "mask; if it was only built without weights, take the slim ones (--weights slim)"
    )
