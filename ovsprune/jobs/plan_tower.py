"""The command ``schedule``: a plan for an image tower, and what a training step of it costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ovsprune.core.errors import OptionError
from ovsprune.core.progress import Progress, Silent
from ovsprune.jobs.listing import Listing, entries
from ovsprune.jobs.measure import Pass, alternate, paired_speedup, peak_memory
from ovsprune.jobs.schedule import schedule
from ovsprune.schedules import POLICIES, TrainPlan
from ovsprune.schedules.flops import TrainingFlops

__all__ = ["list_policies", "plan_tower", "training_step"]

ROUNDS = 5
"""How often a step is timed."""
EVERYTHING = "all"
"""The policy that others are compared with."""


def list_policies() -> Listing:
    """Policies that ``--policy`` takes: ``policies[{name, summary}]``."""
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
        pretrained: As of ``ovsprune prune``.
        pool: Patterns of parameters; by default the whole tower.
        batch_size: Pictures of a step.
        measure: Also time steps, and take their peak memory, against training all layers.
        progress: Who hears about it.
        settings: ``fraction, count, total_steps, every, rest, seed, fit, convolution`` of
            :func:`ovsprune.schedule`.

    Returns:
        ``model, policy, layers[{name, alpha, numel, trains}], trainable[], frozen[],
        training_flops{forward, activations, weights, step, total, all}, measured[], total_steps,
        batch_size, seconds``; ``all`` is what the whole training costs if everything trains.

    Raises:
        OptionError: There is no model, or a number is out of range.
        UnknownNameError: A name is unknown.
        WeightsError: The weights cannot be had or do not fit.
        ScheduleError: A pattern of the pool matches nothing.
    """
    from ovsprune.backbones import load

    if not model:
        raise OptionError("--model is missing: name a model or a slim directory (or ask --list)")
    if batch_size < 1:
        raise OptionError(f"--batch-size {batch_size} must be 1 or more")
    start = time.perf_counter()
    progress = progress or Silent()
    POLICIES.get(policy)  # a wrong name is told before weights are read
    backbone = load(model, pretrained=pretrained)
    tower, shape = backbone.tower, (batch_size, 3, *backbone.preprocess.size)
    shell = _shell(tower)
    plan = schedule(shell, policy, pool=pool or None, weights=tower, progress=progress, **settings)
    names = {"trainable": list(plan.trainable), "frozen": list(plan.frozen)}
    flops = {**_flops(plan, shape).record(), "all": _everything(shell, shape, pool, settings).total}
    record = {
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
        **names,
        "training_flops": flops,
        "total_steps": plan.total_steps,
        "batch_size": batch_size,
        "measured": [],
    }
    if measure:
        trained = {policy: names["trainable"], EVERYTHING: [n for n, _ in tower.named_parameters()]}
        record["measured"] = _measured(model, pretrained, tower, shape, trained, progress)
    return {**record, "seconds": time.perf_counter() - start}


def _shell(tower: nn.Module) -> nn.Module:
    """A copy without weights, whose parameters want gradients as the tower's do."""
    from ovsprune.graph.costs import on_meta

    shell = on_meta(tower).train()
    wanted = {name: parameter.requires_grad for name, parameter in tower.named_parameters()}
    for name, parameter in shell.named_parameters():
        parameter.requires_grad_(wanted[name])
    return shell


def _flops(plan: TrainPlan, shape: Sequence[int]) -> TrainingFlops:
    images = torch.empty(*shape, device="meta")
    return plan.training_flops(lambda: _loss(plan.model, images))


def _everything(
    shell: nn.Module, shape: Sequence[int], pool: Sequence[str], settings: Mapping[str, Any]
) -> TrainingFlops:
    """What it costs to train all layers of the pool, and what follows them."""
    steps = {key: settings[key] for key in ("total_steps", "rest") if key in settings}
    return _flops(schedule(shell, EVERYTHING, pool=pool or None, **steps), shape)


def _loss(tower: nn.Module, images: Tensor) -> Tensor:
    """A number that depends on all of the pooled output."""
    output = tower(images)
    output = output[0] if isinstance(output, tuple) else output
    loss: Tensor = output.float().square().mean()
    return loss


def _measured(
    model: str,
    pretrained: str | None,
    tower: nn.Module,
    shape: Sequence[int],
    trained: Mapping[str, Sequence[str]],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Seconds and peak memory of a step of each, timed in turn: ``speedup`` is all's over its."""
    images = torch.zeros(*shape)
    tower.train()
    passes = {name: training_step(tower, images, names) for name, names in trained.items()}
    times = alternate(passes, rounds=ROUNDS, progress=progress, label="steps")
    rows = []
    with progress.stage("peak memory, a fresh process each", len(trained)) as advance:
        for name, names in trained.items():
            peak = peak_memory(model, shape[0], pretrained=pretrained, trained=names)
            rows.append(
                {
                    "policy": name,
                    "step_seconds": statistics.median(times[name]),
                    "speedup": paired_speedup(times[EVERYTHING], times[name]),
                    "peak_memory": peak,
                }
            )
            advance(1)
    return rows


def training_step(tower: nn.Module, images: Tensor, names: Sequence[str]) -> Pass:
    """A step of AdamW that trains the parameters of those names, and nothing else."""
    chosen, optimizers = set(names), list[torch.optim.Optimizer]()

    def step() -> None:
        with torch.inference_mode(False), torch.enable_grad():
            for name, parameter in tower.named_parameters():
                parameter.requires_grad_(name in chosen)
                parameter.grad = None
            loss = _loss(tower, images)
            if not chosen:
                return
            loss.backward()  # type: ignore[no-untyped-call]
            if not optimizers:
                trained = [p for p in tower.parameters() if p.requires_grad]
                optimizers.append(torch.optim.AdamW(trained, lr=0.0))
            optimizers[0].step()

    return step
