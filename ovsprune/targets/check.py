"""Checks that a slim checkpoint fits a framework, before anything is changed.

A check that fails raises TargetError with the reason. ``layout`` maps the names of the tower's
tensors; ``subject`` describes the model or checkpoint in messages.
"""

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

_COUNTERS = "num_batches_tracked"  # only some norms have it, and no forward pass reads it


def check_trained(checkpoint: SlimCheckpoint, force: bool) -> None:
    """Refuse a checkpoint whose base had random weights, unless ``force`` is true."""
    if not checkpoint.spec.base.trained and not force:
        raise TargetError(
            f"{checkpoint.path} was pruned from {checkpoint.spec.base.model} with random weights "
            "(--pretrained none), so its mask and tensors are random; prune trained weights, or "
            "transfer it with --force (force=True)"
        )


def check_fits(
    state: Mapping[str, Tensor], checkpoint: SlimCheckpoint, layout: Layout, subject: str
) -> None:
    """Compare the shapes of the base's tower with ``state``, by canonical name and shape.

    Missing tensors, other shapes and slim shapes are refused.
    """
    base = checkpoint.spec.base.model
    expected = {n: s for n, s in dense_shapes(checkpoint).items() if not layout.absent_reason(n)}
    slim = {name: tuple(tensor.shape) for name, tensor in checkpoint.tower().items()}
    missing = sorted(n for n in expected.keys() - state.keys() if not n.endswith(_COUNTERS))
    extra = sorted(n for n in state.keys() - expected.keys() if not n.endswith(_COUNTERS))
    if missing or extra:
        side, names = ("lacks", missing) if missing else ("also has", extra)
        raise TargetError(
            f"{subject} is not built on {base}: it {side} {', '.join(names[:4])}"
            f"{', ...' if len(names) > 4 else ''}; build the framework with the CLIP that was "
            "pruned, or prune the CLIP that the framework uses"
        )
    for name, shape in expected.items():
        if name not in state:
            continue
        actual = tuple(state[name].shape)
        if name in layout.stays:
            # positions: the framework may have another number of patches, but not another width
            actual, shape = actual[-1:], shape[-1:]
        if actual == shape:
            continue
        if actual == slim[name]:
            raise TargetError(f"{subject} is slim already ({name} is {actual}); give the dense one")
        if name == POSITIONS and actual[1:] == shape[1:]:
            raise TargetError(
                f"{subject} has {actual[0] - 1} patch positions, the base of {checkpoint.path} has "
                f"{shape[0] - 1}: it was built for another resolution; prune a CLIP of that "
                "resolution"
            )
        raise TargetError(
            f"{subject} is not built on {base}: its {name} has shape {actual}, expected {shape}; "
            "build the framework with the CLIP that was pruned, or prune the CLIP that it uses"
        )


def check_heads(model: nn.Module, checkpoint: SlimCheckpoint, layout: Layout) -> None:
    """Compare the number of heads of the attention modules that will be replaced."""
    for layer in checkpoint.spec.layers:
        path = layout.name(layer.name)
        if not layer.is_whole_attention or path is None or layer.kept == layer.units:
            continue
        module = model.get_submodule(path)
        if hasattr(module, "kept_heads"):
            raise TargetError(f"{path} is slim already; detach first, or build a new model")
        heads = getattr(module, "num_heads", None)
        if heads != layer.units:
            raise TargetError(
                f"{path} has {heads} heads, the base of {checkpoint.path} has {layer.units}; "
                "build the framework with the CLIP that was pruned"
            )


def check_activation(model: nn.Module, checkpoint: SlimCheckpoint, paths: tuple[str, ...]) -> None:
    """Compare the activation modules at ``paths`` with the pruned tower's function, by values.

    Frameworks define their own activation classes, so the class name is not sufficient.
    """
    probe = torch.linspace(-4, 4, 97)  # where the functions differ by more than the tolerance
    functions = {
        "quick_gelu": probe * torch.sigmoid(1.702 * probe),
        "gelu": functional.gelu(probe),
        "gelu_tanh": functional.gelu(probe, approximate="tanh"),
        "relu": functional.relu(probe),
    }
    expected = checkpoint.spec.activation
    for path in paths:
        with torch.no_grad():
            # a copy: nn.ReLU(inplace=True) would overwrite the probe for the next path
            output = model.get_submodule(path)(probe.clone())
        equal = [k for k, v in functions.items() if torch.allclose(output, v, atol=1e-6)]
        if expected in equal:
            continue
        name = equal[0] if equal else "another function"
        raise TargetError(
            f"{path} is {name}, but {checkpoint.path} was pruned with {expected}; build the "
            f"framework with {expected} (OpenAI's CLIP weights are quick_gelu), or prune with "
            f"--activation {name}"
        )


def choose_weights(
    weights: str,
    state: Mapping[str, Tensor] | None,
    checkpoint: SlimCheckpoint,
    layout: Layout,
    mask_only: str,
) -> tuple[Weights, str]:
    """Choose the weights of the slim tower; return them with the reason.

    ``auto`` uses the slim weights if the framework has the frozen base CLIP, which the hashes of
    the base model show for every tensor. If the framework finetuned CLIP, its own weights are cut
    by the mask. Tensors that are not compared: those that always keep the framework's value
    (positions that it resizes and trains), and those that it lacks.

    Args:
        weights: ``"slim"``, ``"target"`` or ``"auto"``.
        state: The framework's tower by canonical name; None without a checkpoint of the framework.
        checkpoint: The slim checkpoint.
        layout: Names of the tower's tensors.
        mask_only: Reason why the framework can use the mask only; empty if it can use the weights.

    Raises:
        OptionError: ``weights`` is none of slim, target and auto.
        TargetError: ``weights`` is target and there is no state to cut, or it is slim and the
            framework can use the mask only.
    """
    if weights not in ("slim", "target", "auto"):
        raise OptionError(f"weights is {weights!r}, expected 'slim', 'target' or 'auto'")
    if mask_only and weights == "slim":  # such a tower computes another function than CLIP's
        raise TargetError(
            f"only the mask can be used: {mask_only}; have the framework's own weights cut "
            "(--weights target, or auto)"
        )
    if state is None:
        if weights == "target" or mask_only:
            raise TargetError(
                "weights=target cuts the framework's own weights, but no checkpoint of it was "
                "given; give one (--checkpoint FILE)"
                + ("" if mask_only else " or take the slim weights (--weights slim)")
            )
        return "slim", "no checkpoint of the framework was given"
    if weights != "auto":
        return ("slim" if weights == "slim" else "target"), "as requested"
    if mask_only:
        return "target", f"only the mask can be used: {mask_only}"
    # by hashes in the spec, so the base model itself is not needed
    compared = {
        name: verdict in ("equal", "equal-after-half")
        for name, verdict in match(state, checkpoint.spec.base).items()
        if name not in layout.stays and layout.absent_reason(name) is None
    }
    different = sorted(name for name, equal in compared.items() if not equal)
    if not different:
        return "slim", f"all {len(compared)} tensors of the framework's tower equal the base's"
    return "target", (
        f"{len(different)} of {len(compared)} tensors of the framework's tower differ from the "
        f"base's ({', '.join(different[:2])}, ...): the framework finetuned CLIP, so its own "
        "weights are cut by the mask; if it was built without weights, use the slim ones "
        "(--weights slim)"
    )
