"""Schedule: which layers of a model train when, and what a training step then costs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ovsprune.core.errors import OptionError, TargetError
from ovsprune.core.progress import Progress, Silent
from ovsprune.core.protocols import Layer
from ovsprune.jobs.listing import Listing, entries
from ovsprune.profiling.timing import (
    alternate,
    output_loss,
    paired_speedup,
    peak_memory,
    training_step,
)
from ovsprune.schedules import POLICIES, TrainPlan
from ovsprune.schedules.flops import TrainingFlops
from ovsprune.schedules.pool import REST, matching, pool_of
from ovsprune.spectrum.matrices import matrices
from ovsprune.spectrum.measure import spectra
from ovsprune.targets import TARGETS
from ovsprune.targets.protocol import Target
from ovsprune.targets.recognise import recognise

__all__ = ["checked", "find_pool", "layer_alphas", "list_policies", "plan_tower", "schedule"]

_ROUNDS = 5  # timed steps per policy
_ALL = "all"  # reference policy


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

    The pool is the set of layers that the policy decides about; fused queries, keys and values are
    one layer. For a framework that a target recognises, the default pool is the image tower, as far
    as the target allows; for other models it is the whole model. Everything outside the pool keeps
    its flags: a framework's own decoder, for example, and embedding tables. If a framework runs its
    tower without gradients, they are enabled.

    Args:
        model: The framework's model or a plain tower, slim or dense.
        policy: A name that ``ovsprune schedule --list`` shows.
        total_steps: Optimiser steps of the whole training; required by policies that change their
            choice.
        fraction: Fraction of the pool's layers that train, in [0, 1].
        count: Number of layers that train, instead of a fraction.
        every: Steps between two choices of a policy; by default a tenth of all steps.
        target: Name of a target; ``"auto"`` uses the one that recognises the model, if any.
        pool: ``fnmatch`` patterns of parameters instead of the default pool (``["backbone.*"]``).
        rest: Treatment of the norms, biases and positions in the pool's part of the model:
            ``"follow"`` (they train with their layer, or with the next one), ``"train"``,
            ``"freeze"`` or ``"keep"``.
        seed: Seed of random policies.
        fit: Fit of the alphas: ``"peak"`` (the paper's), ``"least-ks"`` or ``"hill"``.
        convolution: ``"slices"`` (the paper's) or ``"unfolded"``.
        weights: A model with the same names whose weights are measured, where ``model`` is a copy
            without any (on the meta device, to count what it costs).
        progress: Progress reporter.

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
        # A policy that decides again at the second of two steps changes its choice.
        if len(chosen.decision_steps(2, 1)) > 1:
            raise OptionError(
                f"the policy {policy} changes its choice during training; give the number of "
                "steps: total_steps=..."
            )
        total_steps = 1  # a single decision does not depend on it
    every = checked(total_steps, fraction, count, every, rest)
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    layers, recognised = find_pool(inner, target, pool)
    # Norms, biases and positions follow a layer only with rest="follow"; with "train" and "freeze"
    # the plan fixes their flags, with "keep" it leaves them alone.
    followers = [name for layer in layers for name in layer.followers]
    others = dict.fromkeys(followers, rest == "train") if rest in ("train", "freeze") else {}
    if rest != "follow":
        layers = tuple(Layer(layer.name, layer.numel, layer.tower) for layer in layers)
    plan = TrainPlan(
        model=model,
        layers=layers,
        others=others,
        name=policy,
        policy=chosen,
        fraction=fraction,
        count=count,
        total_steps=total_steps,
        every=every,
        seed=seed,
        # `weights`, because a copy on the meta device has no values to measure.
        alphas=lambda model, names: layer_alphas(
            weights or model, names, fit=fit, convolution=convolution, progress=progress
        ),
    )
    if recognised is not None:
        # Some frameworks run the tower without gradients; released plans restore that.
        plan.on_release(recognised.enable_tower_grad(inner).detach)
    return plan


def checked(
    total_steps: int, fraction: float, count: int | None, every: int | None, rest: str
) -> int:
    """Check the numbers of a schedule; return the steps between two choices."""
    if not 0 <= fraction <= 1:
        raise OptionError(
            f"fraction {fraction} is outside [0, 1]: it is the fraction of layers that train"
        )
    if count is not None and count < 0:
        raise OptionError(f"count {count} must be 0 or more: the number of layers to train")
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
    """Find the layers that a schedule decides about, and the target that recognises the model.

    Raises:
        UnknownNameError: There is no such target.
        ScheduleError: A pattern matches nothing, or the pool is empty.
        TargetError: The named target does not recognise the model, or several targets do.
    """
    name = recognise(model, target)
    if name is None and target != "auto":
        raise TargetError(
            f"{type(model).__name__} is no model of {TARGETS.get(target).framework}; name another "
            'target, or use "auto"'
        )
    recognised = None if name is None else TARGETS.get(name)
    known = None if recognised is None else recognised.tower_names(model)

    def tower(name: str) -> bool:
        return known is None or name in known  # without a target, the whole model is the tower

    if pool is not None:
        # Patterns of the caller may match parameters outside the tower, too.
        touched = matching(model, pool)
    else:
        allowed = ("*",) if recognised is None else recognised.trainable
        touched = [
            name
            for name, _ in model.named_parameters()
            if tower(name) and any(fnmatchcase(name, pattern) for pattern in allowed)
        ]
    return pool_of(model, {m.parameter for m in matrices(model)}, tower, touched), recognised


def layer_alphas(
    model: nn.Module,
    names: Sequence[str],
    *,
    fit: str = "peak",
    convolution: str = "slices",
    progress: Progress | None = None,
) -> Mapping[str, float]:
    """Return the alpha of each named parameter: the mean over the matrices that it holds.

    Fused queries, keys and values have one spectrum each.
    """
    alphas: dict[str, list[float]] = {name: [] for name in names}
    selected = [matrix for matrix in matrices(model) if matrix.parameter in alphas]
    measured = spectra(selected, fit=fit, convolution=convolution, progress=progress or Silent())
    for matrix, spectrum in zip(selected, measured, strict=True):
        alphas[matrix.parameter].append(spectrum.alpha)
    # Only parameters with a matrix are in a pool, so no list is empty.
    return {name: sum(values) / len(values) for name, values in alphas.items()}


def list_policies() -> Listing:
    """List the policies of ``--policy``: ``policies[{name, summary}]``."""
    return {"policies": entries(POLICIES)}


def plan_tower(
    model: str | None,
    policy: str = "alpha",
    *,
    pretrained: str | None = None,
    pool: Sequence[str] = (),
    batch_size: int = 1,
    measure: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Plan the training of an image tower by name, and count its steps on a meta copy.

    Args:
        model: A model name or a slim directory.
        policy: Name of the policy.
        pretrained: Weights, as for ``ovsprune prune``.
        pool: Patterns of parameters; by default the whole tower.
        batch_size: Images per step.
        measure: Also measure time and peak memory of a step, against training all layers.
        progress: Progress reporter.
        settings: Options ``fraction, count, total_steps, every, rest, seed, fit, convolution`` of
            :func:`ovsprune.schedule`.

    Returns:
        ``model, policy, layers[{name, alpha, numel, trains}], trainable[], frozen[],
        training_flops{forward, activations, weights, step, total, all}, measured[], total_steps,
        batch_size, seconds``; ``all`` is the cost of the whole training if everything trains.

    Raises:
        OptionError: There is no model, or a number is out of range.
        UnknownNameError: A name is unknown.
        WeightsError: The weights cannot be loaded or do not fit.
        ScheduleError: A pattern of the pool matches nothing.
    """
    # Not above: where a framework calls schedule(), the libraries of backbones may be missing.
    from ovsprune.backbones import load_backbone

    if not model:
        raise OptionError("--model is missing: name a model or a slim directory (or use --list)")
    if batch_size < 1:
        raise OptionError(f"--batch-size {batch_size} must be 1 or more")
    start = time.perf_counter()
    progress = progress or Silent()
    POLICIES.get(policy)  # an unknown name is reported before weights are read
    backbone = load_backbone(model, pretrained=pretrained)
    tower, shape = backbone.tower, (batch_size, 3, *backbone.preprocess.size)
    shell = _shell(tower)
    plan = schedule(shell, policy, pool=pool or None, weights=tower, progress=progress, **settings)
    trainable, frozen = list(plan.trainable), list(plan.frozen)
    # Count before the second schedule, which changes the flags of the same copy.
    flops = _flops(plan, shape).record()
    # These two change the cost even if all layers train; the others do not matter then.
    steps = {key: settings[key] for key in ("total_steps", "rest") if key in settings}
    all_layers = schedule(shell, _ALL, pool=pool or None, **steps)
    measured = []
    if measure:
        trained = {policy: trainable, _ALL: [name for name, _ in tower.named_parameters()]}
        measured = _measured(model, pretrained, tower, shape, trained, progress)
    return {
        "model": model,
        "policy": policy,
        "layers": [
            {
                "name": layer.name,
                "alpha": None if plan.alphas is None else plan.alphas[layer.name],
                "numel": layer.numel,
                "trains": layer.name in plan.chosen,
            }
            for layer in plan.layers
        ],
        "trainable": trainable,
        "frozen": frozen,
        "training_flops": {**flops, "all": _flops(all_layers, shape).total},
        "total_steps": plan.total_steps,
        "batch_size": batch_size,
        "measured": measured,
        "seconds": time.perf_counter() - start,
    }


def _shell(tower: nn.Module) -> nn.Module:
    """Copy the tower without weights; parameters keep their ``requires_grad``."""
    from ovsprune.graph.costs import on_meta

    # on_meta returns a copy in evaluation mode, whose parameters need no gradients.
    shell = on_meta(tower).train()
    for copied, parameter in zip(shell.parameters(), tower.parameters(), strict=True):
        copied.requires_grad_(parameter.requires_grad)
    return shell


def _flops(plan: TrainPlan, shape: Sequence[int]) -> TrainingFlops:
    images = torch.empty(*shape, device="meta")
    return plan.training_flops(lambda: output_loss(plan.model, images))


def _measured(
    model: str,
    pretrained: str | None,
    tower: nn.Module,
    shape: Sequence[int],
    trained: Mapping[str, Sequence[str]],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Measure a step of each policy: seconds, speedup over training all layers, peak memory."""
    images = torch.zeros(*shape)
    tower.train()
    passes = {name: training_step(tower, images, names) for name, names in trained.items()}
    times = alternate(passes, rounds=_ROUNDS, progress=progress, label="steps")
    rows = []
    with progress.stage("peak memory, one process each", len(trained)) as advance:
        for name, names in trained.items():
            peak = peak_memory(model, shape[0], pretrained=pretrained, trained=names)
            rows.append(
                {
                    "policy": name,
                    "step_seconds": statistics.median(times[name]),
                    "speedup": paired_speedup(times[_ALL], times[name]),
                    "peak_memory": peak,
                }
            )
            advance(1)
    return rows
