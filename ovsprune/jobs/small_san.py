"""Last step of the demo: transfer into a small SAN built from mmsegmentation's config."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ovsprune.core.errors import MissingLibraryError
from ovsprune.core.protocols import Backbone
from ovsprune.evaluation.datasets import Sample
from ovsprune.evaluation.zero_shot import prepare_image

__all__ = ["transfer_into_small_san"]

# Scale of the cosine similarities in OpenAI's released CLIP models.
LOGIT_SCALE = 100.0


def transfer_into_small_san(
    dense: Backbone,
    slim: Path,
    embeddings: Tensor,
    names: Sequence[str],
    samples: Sequence[Sample],
    seed: int = 0,
) -> dict[str, Any]:
    """Attach a slim tower to a SAN with its dense base, and compare the outputs.

    The SAN's side adapter is untrained, so only the change of its masks is meaningful. Its
    attention bias is scaled to a standard deviation of 1; otherwise it would hardly affect the
    outputs.

    Args:
        dense: Dense base of ``slim``, a ViT.
        slim: Slim checkpoint.
        embeddings: Class embeddings [K, C].
        names: Names of the K classes.
        samples: Images to compare on.
        seed: Seed of the adapter's weights.

    Returns:
        ``target, modules`` (replaced), ``params{before, after}``, ``cosine{masks, logits}`` and
        ``agreement`` (fraction of pixels with the same class) of slim against dense SAN,
        ``detached`` (True if detaching restored the dense outputs bit for bit), ``seconds``; or
        ``skipped`` with the reason if mmsegmentation is not installed.
    """
    from ovsprune.jobs.transfer import transfer
    from ovsprune.targets.mmseg_build import load_tower, run_san, scale_bias, set_class_embeddings

    start = time.perf_counter()
    try:
        model = _build(dense, names, seed)
    except MissingLibraryError as error:
        return {"skipped": str(error)}
    # The SAN was built with random weights; the transfer needs the base of the slim checkpoint.
    load_tower(model, dense.tower.state_dict())
    set_class_embeddings(model, dict(zip(names, embeddings, strict=True)), LOGIT_SCALE)
    images = _images(dense, samples)
    scale_bias(model, images, std=1.0)
    before = run_san(model, images)
    attached = transfer(model, slim, "mmseg-san")
    after = run_san(model, images)
    # [B, classes, h, w] -> [B, h, w]
    before_classes, after_classes = (out["segmentation"].argmax(1) for out in (before, after))
    attached.detach()
    restored = run_san(model, images)
    return {
        "target": attached.target,
        "weights": attached.weights,
        "modules": len(attached.replaced),
        "params": {"before": attached.params_before, "after": attached.params_after},
        "cosine": {key: _cosine(before[key], after[key]) for key in ("masks", "logits")},
        "agreement": float((before_classes == after_classes).float().mean()),
        "detached": all(torch.equal(before[key], restored[key]) for key in before),
        "seconds": time.perf_counter() - start,
    }


def _build(dense: Backbone, names: Sequence[str], seed: int) -> Any:
    from ovsprune.targets.mmseg_build import SanShape, build_san

    # The shapes of a state dict do not show the number of heads.
    attention: Any = dense.tower.get_submodule("transformer.resblocks.0.attn")
    shape = SanShape.small(
        dense.tower.state_dict(),
        heads=attention.num_heads,
        size=dense.preprocess.size[0],
        activation=dense.activation,
    )
    return build_san(names, shape, seed=seed)


def _images(dense: Backbone, samples: Sequence[Sample]) -> Tensor:
    """Return images [B, 3, H, W] at twice the tower's size, because SAN halves them for CLIP."""
    images = torch.stack([prepare_image(sample.image, dense.preprocess) for sample in samples])
    return F.interpolate(images, scale_factor=2, mode="bilinear")


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))
