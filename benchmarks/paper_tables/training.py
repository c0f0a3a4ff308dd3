"""One training: from a run to its row, going on where it stopped.

A row is a JSON file that appears whole when its training and both evaluations are done. Several
processes can work on one queue: each holds a lock on the run that it does, which the system lets
go of if the process dies.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from assemble import Assembled, assemble
from frameworks import FRAMEWORKS
from plan import SCHEDULED, STEPS, Run
from torch import Tensor

POOL = ("backbone.conv*", "backbone.bn*", "backbone.layer*")
"""What a policy decides about: the convolutions, which are the paper's layers too. What Mask2Former
runs of the attention pool trains always."""


@dataclass(frozen=True)
class Settings:
    """What a training depends on beside its run; the same for all, and kept in checkpoints."""

    steps: int = STEPS
    batch: int = 8
    rate: float = 1e-3
    tower: float = 0.2
    warmup: int = 30
    decay: float = 0.05
    clip: float = 1.0
    limit: int | None = None  # pictures that are scored; None for all
    recipe: int = 3  # counts up when the scripts change what a row means: rows of two do not mix


@cache
def photographs(data: Path) -> Any:
    """MSRC's train list, with its own classes first among the names."""
    import places  # noqa: F401
    from data import read_photos

    photos = read_photos(data)
    mine = photos.origin == 0
    weights = photos.weights[mine.numpy()]
    return replace(
        photos,
        images=photos.images[mine],
        labels=photos.labels[mine],
        origin=photos.origin[mine],
        weights=weights / weights.sum(),
    )


def vocabulary(photos: Any) -> Tensor:
    """The embeddings of MSRC's classes, unit length [K, 512]; labels are their rows."""
    count = int(photos.classes[0].sum())
    if not photos.classes[0, :count].all():
        raise SystemExit("MSRC's classes are not the first of the names")
    rows: Tensor = photos.embeddings[:count]
    return rows


def rate_at(step: int, settings: Settings) -> float:
    """Share of the learning rate: linear warm-up and a cosine to zero."""
    warm = min(1.0, (step + 1) / settings.warmup)
    return warm * 0.5 * (1.0 + math.cos(math.pi * step / settings.steps))


def optimizer_of(made: Assembled, settings: Settings) -> torch.optim.AdamW:
    """AdamW; the tower has a rate of its own, and what has one axis does not decay."""
    names = {id(p): n for n, p in made.holder.named_parameters()}
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for parameter in made.module.parameters():
        if parameter.requires_grad:
            tower = names.get(id(parameter)) in made.tower
            rate = settings.rate * (settings.tower if tower else 1.0)
            decay = settings.decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": p, "lr": rate, "full": rate, "weight_decay": decay}
            for (rate, decay), p in groups.items()
        ],
        fused=True,
    )


def schedule_of(made: Assembled, run: Run, settings: Settings) -> Any:
    """Which layers train when; None outside Table 2's framework."""
    if run.framework != SCHEDULED:
        return None
    import ovsprune

    return ovsprune.schedule(
        made.holder,
        policy=run.policy,
        fraction=0.5,
        total_steps=settings.steps,
        seed=run.seed,
        pool=POOL,
    )


def train(
    run: Run, data: Path, work: Path, settings: Settings, save_every: float = 60.0
) -> dict[str, Any]:
    """The row of a run, trained from its last checkpoint in ``work``, if there is one."""
    from data import batch

    photos = photographs(data)
    text = vocabulary(photos)
    made = assemble(run, len(text), work)
    module = made.module.train()
    optimizer = optimizer_of(made, settings)
    plan = schedule_of(made, run, settings)
    if plan is not None:
        plan.bind(optimizer)
    counts: dict[tuple[str, ...], int] = {}
    last = work / "checkpoints" / f"{run.name}.pt"
    first, wall, cpu, losses, flops = _resume(last, settings, module, optimizer, plan)
    start, cpu_start, saved = time.monotonic(), time.process_time(), time.monotonic()
    for step in range(first, settings.steps):
        found = batch(photos, step, settings.batch, run.seed)
        if plan is not None:
            plan.step(step)
            if plan.chosen not in counts:
                counts[plan.chosen] = _flops(module, plan, found, text)
            flops += counts[plan.chosen]
        loss, norm = one_step(module, optimizer, plan, found, text, step, run.seed, settings)
        losses.append(loss)
        if step % 50 == 49:
            recent = sum(losses[-50:]) / len(losses[-50:])
            print(
                f"{run.name} {step + 1}/{settings.steps} loss {recent:.3f} gradient {norm:.1f} "
                f"{wall + time.monotonic() - start:.0f} s",
                flush=True,
            )
        if time.monotonic() - saved > save_every and step + 1 < settings.steps:
            saved = time.monotonic()
            _save(
                last,
                model=module.state_dict(),
                optimizer=optimizer.state_dict(),
                plan=None if plan is None else plan.state_dict(),
                step=step + 1,
                wall=wall + saved - start,
                cpu=cpu + time.process_time() - cpu_start,
                losses=losses,
                flops=flops,
                settings=asdict(settings),
            )
    wall, cpu = wall + time.monotonic() - start, cpu + time.process_time() - cpu_start
    made.check()
    scores = {name: score(module, name, data, settings.limit) for name in SETS}
    row = {
        **asdict(run),
        "settings": asdict(settings),
        "scores": scores,
        "first_loss": sum(losses[:10]) / len(losses[:10]),
        "last_loss": sum(losses[-10:]) / len(losses[-10:]),
        "seconds": {"wall": wall, "cpu": cpu},
        "zeros": made.zeros,
        "training_flops": {"total": flops} if plan is not None else None,
        "chosen": None if plan is None else list(plan.chosen),
        "alphas": None if plan is None or plan.alphas is None else _finite(plan.alphas),
    }
    last.unlink(missing_ok=True)
    return row


def one_step(
    module: Any,
    optimizer: torch.optim.Optimizer,
    plan: Any,
    found: Any,
    text: Tensor,
    step: int,
    seed: int,
    settings: Settings,
) -> tuple[float, float]:
    """A step on a batch: the loss before it, and the norm of its gradient."""
    # Everything that is drawn is a function of seed and step, so a resumed run is the same.
    torch.manual_seed(seed * 1_000_003 + step)
    if plan is not None:
        plan.step(step)
    for group in optimizer.param_groups:
        group["lr"] = group["full"] * rate_at(step, settings)
    loss = module.loss(found.images, found.labels, text)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), settings.clip)
    optimizer.step()
    return loss.item(), float(norm)


def _finite(alphas: Mapping[str, float]) -> dict[str, float | None]:
    """None for a layer that is too narrow for a fit, which JSON has no other word for."""
    return {name: alpha if math.isfinite(alpha) else None for name, alpha in alphas.items()}


def _resume(
    last: Path, settings: Settings, module: Any, optimizer: Any, plan: Any
) -> tuple[int, float, float, list[float], int]:
    """Step, seconds of both kinds, losses and counted FLOPs so far."""
    if not last.exists():
        return 0, 0.0, 0.0, [], 0
    state = torch.load(last, weights_only=True)
    if state["settings"] != asdict(settings):
        raise SystemExit(f"{last} was made with other settings: {state['settings']}")
    module.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if plan is not None:
        plan.load_state_dict(state["plan"])
    return state["step"], state["wall"], state["cpu"], list(state["losses"]), state["flops"]


def _save(path: Path, **state: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    torch.save(state, partial)
    os.replace(partial, path)


def _flops(module: Any, plan: Any, found: Any, text: Tensor) -> int:
    """Counted FLOPs of a step with what trains now; running statistics are put back afterwards."""
    from ovsprune.schedules.flops import step_flops

    buffers = {n: b.clone() for n, b in module.named_buffers()}
    torch.manual_seed(0)
    counted = step_flops(plan.model, lambda: module.loss(found.images, found.labels, text))
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])
    return counted.step


SETS = {"msrc_test": ("msrc", "test.txt"), "camvid_val": ("camvid/val", None)}
"""As in photo_clip/evaluate.py: pictures that no training opened."""


class _Head:
    """A framework in the shape that ``ovsprune.evaluation.evaluate`` asks for."""

    def __init__(self, module: Any, embeddings: Tensor, preprocess: Any) -> None:
        self.module, self.embeddings, self.preprocess = module, embeddings, preprocess

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        scores: Tensor = self.module.predict(images, self.embeddings)
        return scores


def score(module: Any, name: str, data: Path, limit: int | None = None) -> dict[str, float]:
    """mIoU by the protocol of ``photo``: the labels' full resolution, absent classes left out."""
    from masks import FOLDERS

    from ovsprune import backbones
    from ovsprune.evaluation import FolderData, evaluate
    from ovsprune.evaluation.text import read_embeddings

    folder, listing = SETS[name]
    base = data / folder
    pictures = FolderData(base, list_file=base / listing if listing else None, limit=limit)
    rows = read_embeddings(next((data / "text").glob("*.npz")), pictures.prompts)
    module.eval()
    head: Any = _Head(module, rows, backbones.load_backbone(str(FOLDERS["vit"])).preprocess)
    result = evaluate(head, pictures, batch_size=8)
    return {
        "miou": result.scores.miou,
        "pixel_accuracy": result.scores.pixel_accuracy,
        "images": result.images,
        "seconds": result.seconds,
    }


def check_recipe(row: Mapping[str, Any], settings: Settings) -> None:
    """That a row was made as the others are.

    Raises:
        SystemExit: It was not.
    """
    if row["settings"] != asdict(settings):
        name = Run(row["framework"], row["mask"], row["policy"], row["seed"]).name
        raise SystemExit(
            f"the row {name} was made by another recipe ({row['settings']}): start anew with "
            "--fresh and another --work"
        )


@contextmanager
def claimed(file: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone holds ``file`` inside the block; it does if it was to wait."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            yield False
            return
        yield True


def write_row(file: Path, row: Mapping[str, Any]) -> None:
    """Writes a row so that a reader never sees half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.part")
    partial.write_text(json.dumps(row, indent=2) + "\n")
    os.replace(partial, file)


def do(run: Run, data: Path, work: Path, settings: Settings) -> bool:
    """Makes the row of a run unless it is there, or another process is at it."""
    file = work / "rows" / f"{run.name}.json"
    if file.exists():
        check_recipe(json.loads(file.read_text()), settings)
        return False
    with claimed(work / "locks" / f"{run.name}.lock") as mine:
        if not mine or file.exists():
            return False
        backbone = FRAMEWORKS[run.framework].backbone
        row = {**train(run, data, work, settings), "backbone": backbone}
        write_row(file, row)
    return True
