"""Trains ``tiny`` from scratch: dense region-text contrast and image-text contrast.

One command does it all, and goes on where it stopped when it is run again:

    python benchmarks/tiny_clip/train.py --work DIR

DIR gets the rendered scenes, a checkpoint every two minutes and, at the end, ``final.pt``;
``export.py`` makes the package's files from any of them.
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

import numpy as np
import torch
import torch.nn.functional as F
from data import CROP, PHRASES, Batch, Scenes
from model import MODEL_CFG, PREPROCESS_CFG, build, encode_dense
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from ovsprune.calibration.scenes import CLASS_NAMES, COLOURS, MATERIALS, SEEN

TEMPLATES = ("a photo of a {}", "{}", "a picture of a {}", "a {} in a scene")


@dataclass(frozen=True)
class Settings:
    """What a run depends on; kept in its checkpoints."""

    steps: int = 4500
    batch: int = 24
    scenes: int = 20_000
    seed: int = 0
    rate: float = 1e-3
    warmup: int = 300
    text_steps: int = 100
    text_locked: float = 1.0
    decay: float = 0.2
    cooldown: float = 0.4
    points: int = 256
    weight_class: float = 1.0
    weight_phrase: float = 0.7
    weight_image: float = 0.25


class Texts:
    """Tokens of all prompts in all templates, made once."""

    def __init__(self) -> None:
        length = MODEL_CFG["text_cfg"]["context_length"]
        self.tokenize = SimpleTokenizer(context_length=length)
        self.classes = [self.tokenize([t.format(n) for n in CLASS_NAMES]) for t in TEMPLATES]
        self.phrases = [self.tokenize([t.format(p) for p in PHRASES]) for t in TEMPLATES]
        self.locked: list[tuple[Tensor, Tensor]] | None = None

    @torch.no_grad()
    def lock(self, model: CLIP) -> None:
        """Embeds all prompts once, for the steps in which the text tower does not learn."""
        self.locked = [
            (model.encode_text(names), model.encode_text(phrases))
            for names, phrases in zip(self.classes, self.phrases, strict=True)
        ]

    def embed(
        self, model: CLIP, forms: Sequence[int], present: Tensor, captions: list[str]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Unit-length embeddings of all class names, the present phrases and the captions."""
        if self.locked is not None:
            names, prompts = self.locked[forms[0]][0], self.locked[forms[1]][1][present]
            with torch.no_grad():
                sentences = model.encode_text(self.tokenize(captions))
        else:
            names, phrases = self.classes[forms[0]], self.phrases[forms[1]][present]
            tokens = torch.cat([names, phrases, self.tokenize(captions)])
            text = model.encode_text(tokens)
            names, prompts, sentences = text.split([len(names), len(present), len(captions)])
        return (
            F.normalize(names, dim=-1),
            F.normalize(prompts, dim=-1),
            F.normalize(sentences, dim=-1),
        )


def sample_points(dense: Tensor, points: Tensor) -> Tensor:
    """Dense features at pixels, as bilinear upsampling gives them.

    Args:
        dense: shape (B, C, h, w).
        points: rows and columns in a picture of side `CROP`, shape (B, N, 2).

    Returns:
        Features of shape (B, N, C).
    """
    place = ((points.float() + 0.5) * (2.0 / CROP) - 1.0).flip(-1)[:, None]
    sampled = F.grid_sample(
        dense, place, mode="bilinear", padding_mode="border", align_corners=False
    )
    return sampled[:, :, 0].transpose(1, 2)


def losses(
    model: CLIP, batch: Batch, texts: Texts, settings: Settings, step: int
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch, and its parts."""
    rng = np.random.default_rng((settings.seed, 1, step))
    mean = torch.tensor(PREPROCESS_CFG["mean"]).view(1, 3, 1, 1)
    std = torch.tensor(PREPROCESS_CFG["std"]).view(1, 3, 1, 1)
    images = (torch.from_numpy(batch.images).float() / 255.0 - mean) / std
    size = images.shape[0]
    picks = torch.from_numpy(rng.integers(0, CROP, (size, settings.points, 2)))
    rows = torch.arange(size)[:, None]
    labels = torch.from_numpy(batch.labels)[rows, picks[..., 0], picks[..., 1]]
    phrases = torch.from_numpy(batch.phrases)[rows, picks[..., 0], picks[..., 1]]
    present, target = phrases.unique(return_inverse=True)

    forms = rng.integers(len(TEMPLATES), size=2).tolist()
    names, prompts, captions = texts.embed(model, forms, present, batch.captions)
    pooled, dense = encode_dense(model, images)
    scale = model.logit_scale.exp()
    features = scale * sample_points(dense, picks).flatten(0, 1)
    by_class = F.cross_entropy(features @ names.T, labels.flatten())
    by_phrase = F.cross_entropy(features @ prompts.T, target.flatten())
    pairs = scale * pooled @ captions.T
    own = torch.arange(size)
    by_image = (F.cross_entropy(pairs, own) + F.cross_entropy(pairs.T, own)) / 2
    total = (
        settings.weight_class * by_class
        + settings.weight_phrase * by_phrase
        + settings.weight_image * by_image
    )
    parts = {"class": by_class.item(), "phrase": by_phrase.item(), "image": by_image.item()}
    return total, parts


def make_optimizer(model: CLIP, settings: Settings) -> torch.optim.AdamW:
    """AdamW; norms, biases, embeddings and the scale are not decayed."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or "embedding" in name
        (free if plain else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": settings.decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.99), eps=1e-6)


def warm_up_text(model: CLIP, texts: Texts, settings: Settings) -> None:
    """Lets the text tower tell the class names apart before there are pictures.

    Without it class names start almost parallel, pictures start without shapes, and each waits
    for the other; for the same reason the text tower is locked for the first part of the training
    (``text_locked``). No held-out combination is named.

    A class name, colour or material in one template is the positive of itself in another, and a
    full phrase is that of each of its three words; the other words of the kind are the negatives.
    """
    parameters = [p for n, p in model.named_parameters() if not n.startswith("visual.")]
    optimizer = torch.optim.AdamW(parameters, lr=settings.rate, betas=(0.9, 0.99), weight_decay=0.0)
    kinds = (len(CLASS_NAMES), len(COLOURS), len(MATERIALS))
    words = (*CLASS_NAMES, *COLOURS, *MATERIALS)
    every = [texts.tokenize([t.format(w) for w in words]) for t in TEMPLATES]
    own = torch.arange(len(words))
    seen = torch.tensor([PHRASES.index(combination.phrase) for combination in SEEN])
    for step in range(settings.text_steps):
        rng = np.random.default_rng((settings.seed, 2, step))
        first, second, third = rng.integers(len(TEMPLATES), size=3)
        picks = seen[torch.from_numpy(rng.integers(len(seen), size=64))]
        tokens = [every[first], every[second], texts.phrases[third][picks]]
        text = F.normalize(model.encode_text(torch.cat(tokens)), dim=-1)
        one, two, phrases = text.split([len(words), len(words), len(picks)])
        loss = F.cross_entropy(20.0 * one @ two.T, own)
        parts = torch.split(20.0 * phrases @ one.T, kinds, dim=1)
        shape, colour = picks // (kinds[1] * kinds[2]), picks // kinds[2] % kinds[1]
        for logits, target in zip(parts, (shape, colour, picks % kinds[2]), strict=True):
            loss = loss + F.cross_entropy(logits, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"text {step}/{settings.text_steps} {loss.item():.3f}", flush=True)


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


def train(work: Path, settings: Settings, save_every: float = 120.0) -> Path:
    """Trains, from the last checkpoint in ``work`` if there is one.

    Args:
        work: folder for scenes and checkpoints.
        settings: what the run depends on.
        save_every: seconds between checkpoints.

    Returns:
        The final checkpoint.
    """
    work.mkdir(parents=True, exist_ok=True)
    scenes = Scenes(work / "scenes", settings.scenes, settings.seed)
    texts = Texts()
    torch.manual_seed(settings.seed)
    model = build().train()
    optimizer = make_optimizer(model, settings)
    last, first, spent = work / "last.pt", 0, 0.0
    if last.exists():
        state = torch.load(last, weights_only=True)
        if {**state["settings"], "steps": 0} != {**asdict(settings), "steps": 0}:
            raise SystemExit(f"{last} was made with other settings: {state['settings']}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent = state["step"], state["seconds"]
    start = saved = time.monotonic()
    if first == 0:
        warm_up_text(model, texts, settings)
    for step in range(first, settings.steps):
        if step >= settings.text_locked * settings.steps:
            texts.locked = None
        elif texts.locked is None:
            texts.lock(model)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, settings)
        batch = scenes.batch(step, settings.batch, settings.seed)
        loss, parts = losses(model, batch, texts, settings, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0.0, math.log(100.0))
        now = time.monotonic()
        seconds = spent + now - start
        if step % 50 == 0:
            shown = " ".join(f"{name} {value:.3f}" for name, value in parts.items())
            print(f"step {step}/{settings.steps} {seconds:.0f} s {shown}", flush=True)
        if now - saved > save_every:
            saved = now
            save(
                last,
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step + 1,
                seconds=seconds,
                settings=asdict(settings),
            )
    final = work / "final.pt"
    save(
        final,
        model=model.state_dict(),
        step=settings.steps,
        seconds=spent + time.monotonic() - start,
        settings=asdict(settings),
    )
    return final


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="scenes and checkpoints go here")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--scenes", type=int, default=Settings.scenes)
    parser.add_argument("--batch", type=int, default=Settings.batch)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    settings = Settings(
        steps=chosen.steps, scenes=chosen.scenes, batch=chosen.batch, seed=chosen.seed
    )
    print(train(chosen.work, settings))


if __name__ == "__main__":
    main()
