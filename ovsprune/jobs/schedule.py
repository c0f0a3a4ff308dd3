"""schedule: which layers of a model train when, decided by their spectra or otherwise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ovsprune.core.errors import OptionError, TargetError
from ovsprune.core.progress import Progress, Silent
from ovsprune.core.protocols import Layer
from ovsprune.schedules import POLICIES, TrainPlan
from ovsprune.schedules.pool import REST, matching, pool_of
from ovsprune.spectrum.matrices import matrices
from ovsprune.spectrum.measure import spectra
from ovsprune.targets import TARGETS
from ovsprune.targets.protocol import Target

__all__ = ["checked", "find_pool", "layer_alphas", "schedule"]


def schedule(
    model: nn.Module,
    policy: str = "alpha",
    *,
    total_steps: int | None = None,
    fraction: float = 0.5,
    count: int | None = None,
    every: int | None = None,
    target: str = "auto",
    pool: Sequence[str] | None = None,
    rest: str = "follow",
    seed: int = 0,
    fit: str = "peak",
    convolution: str = "slices",
    weights: nn.Module | None = None,
    progress: Progress | None = None,
) -> TrainPlan:
    """Plan which layers of a model train when, and freeze what does not train at first.

    The pool is what the policy decides about: weights of layers, fused queries, keys and values
    being one. By default it is the image tower of a framework that a target knows, as far as the
    target lets a schedule touch it, and all of another model. Everything outside stays as it is,
    a framework's own decoder among it; so do embedding tables. Where a framework runs its tower
    without gradients, that is lifted.

    Args:
        model: The framework's model or a plain tower, slim or dense.
        policy: A name that ``ovsprune schedule --list`` shows.
        total_steps: Optimiser steps of the whole training; policies that change their mind need it.
        fraction: Share of the pool's layers that train, in [0, 1].
        count: How many layers train, instead of a share.
        every: How often a policy may change its mind, in steps; by default a tenth of all.
        target: Name of a target; ``"auto"`` asks each whether it knows the model.
        pool: ``fnmatch`` patterns of parameters instead of the default pool (``["backbone.*"]``).
        rest: What becomes of the norms, biases and positions in the pool's part of the model:
            ``"follow"`` (they train with their layer, or with the next one), ``"train"``,
            ``"freeze"`` or ``"keep"``.
        seed: For policies that draw.
        fit: How alphas are fitted: ``"peak"`` (the paper's), ``"least-ks"`` or ``"hill"``.
        convolution: ``"slices"`` (the paper's) or ``"unfolded"``.
        weights: A model with the same names whose weights are measured, where ``model`` is a copy
            without any (on the meta device, to count what it costs).
        progress: Who hears about it.

    Returns:
        The plan; call its ``step`` before every optimiser step. Make the optimiser afterwards.

    Raises:
        UnknownNameError: There is no such policy, target or fit.
        OptionError: A number is out of range, or ``total_steps`` is missing.
        ScheduleError: A pattern matches nothing, the pool is empty, or DistributedDataParallel
            wraps the model in a way that cannot follow.
    """
    chosen = POLICIES.get(policy)
    if total_steps is None:
        if len(chosen.moments(2, 1)) > 1:
            raise OptionError(
                f"the policy {policy} changes its mind during a training: say how long it is, "
                "total_steps=..."
            )
        total_steps = 1
    every = checked(total_steps, fraction, count, every, rest)
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    layers, knowing = find_pool(inner, target, pool)
    followers = [name for layer in layers for name in layer.followers]
    others = dict.fromkeys(followers, rest == "train") if rest in ("train", "freeze") else {}
    if rest != "follow":
        layers = tuple(Layer(layer.name, layer.numel, layer.tower) for layer in layers)
    plan = TrainPlan(
        model,
        layers,
        others,
        policy,
        chosen,
        fraction=fraction,
        count=count,
        total_steps=total_steps,
        every=every,
        seed=seed,
        alphas=lambda model, names: layer_alphas(
            weights or model, names, fit=fit, convolution=convolution, progress=progress
        ),
    )
    if knowing is not None:
        plan.on_release(knowing.lift(inner).detach)
    return plan


def checked(
    total_steps: int, fraction: float, count: int | None, every: int | None, rest: str
) -> int:
    """How often a policy may change its mind, once every number was looked at."""
    if not 0 <= fraction <= 1:
        raise OptionError(f"fraction {fraction} is outside [0, 1]: the share of layers that train")
    if count is not None and count < 0:
        raise OptionError(f"count {count} must be 0 or more: how many layers train")
    if total_steps < 1:
        raise OptionError(f"total_steps {total_steps} must be 1 or more")
    if every is not None and every < 1:
        raise OptionError(f"every {every} must be 1 step or more")
    if rest not in REST:
        raise OptionError(f"rest is {rest!r}, expected one of {', '.join(REST)}")
    return math.ceil(total_steps / 10) if every is None else every


def find_pool(
    model: nn.Module, target: str = "auto", pool: Sequence[str] | None = None
) -> tuple[tuple[Layer, ...], Target | None]:
    """The layers that a schedule decides about, and the target that knows the model, if one does.

    Raises:
        UnknownNameError: There is no such target.
        ScheduleError: A pattern matches nothing, or the pool is empty.
        TargetError: The target that was named does not know the model, or several do.
    """
    knowing = _recognised(model, target)
    known = None if knowing is None else knowing.tower_names(model)

    def tower(name: str) -> bool:
        return known is None or name in known

    if pool is not None:
        touched = matching(model, pool)
    else:
        allowed = ("*",) if knowing is None else knowing.trainable
        touched = [
            name
            for name, _ in model.named_parameters()
            if tower(name) and any(fnmatchcase(name, pattern) for pattern in allowed)
        ]
    return pool_of(model, {m.parameter for m in matrices(model)}, tower, touched), knowing


def _recognised(model: nn.Module, name: str) -> Target | None:
    if name != "auto":
        target = TARGETS.get(name)
        if not target.detect(model):
            raise TargetError(f"{type(model).__name__} is no model of {target.framework}")
        return target
    detected = [t for t in map(TARGETS.get, TARGETS) if t.detect(model)]
    knowing = [t for t in detected if not t.fallback] or detected
    if len(knowing) > 1:
        said = " and of ".join(t.framework for t in knowing)
        raise TargetError(
            f"{type(model).__name__} looks like a model of {said}; say which it is (target=...)"
        )
    return knowing[0] if knowing else None


def layer_alphas(
    model: nn.Module,
    names: Sequence[str],
    *,
    fit: str = "peak",
    convolution: str = "slices",
    progress: Progress | None = None,
) -> Mapping[str, float]:
    """Name of a parameter to its alpha: the mean over the matrices that it holds.

    Fused queries, keys and values have a spectrum each.
    """
    wanted = set(names)
    found = [matrix for matrix in matrices(model) if matrix.parameter in wanted]
    measured = spectra(found, fit=fit, convolution=convolution, progress=progress or Silent())
    alphas: dict[str, list[float]] = {name: [] for name in names}
    for matrix, spectrum in zip(found, measured, strict=True):
        alphas[matrix.parameter].append(spectrum.alpha)
    return {name: sum(values) / len(values) for name, values in alphas.items()}
