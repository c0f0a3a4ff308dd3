"""Models of transformers: load weights, separate vision and text tower, and encode texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsprune.backbones.fitting import describe_faults, fit
from ovsprune.core.errors import WeightsError
from ovsprune.slim.transformers_build import (
    TWO_TOWER_CLASSES,
    build_model,
    build_tower,
    transformers_library,
)
from ovsprune.slim.transformers_tower import TransformersTower

__all__ = ["encoder_of", "filled", "quiet", "text_of", "tower_in", "with_text"]

_VISION = ("vision_model.", "visual_projection.")
"""Prefixes of the vision tower's tensors in a model with two towers."""

Architecture = Mapping[str, Any]
State = Mapping[str, Tensor]


def filled(name: str, path: Path, architecture: Architecture, state: State) -> nn.Module:
    """Build a model with the weights of ``state``, in float32.

    transformers converts the names of older versions. Tensors that the model does not have (a
    classifier, the other tower) are ignored. ``name`` and ``path`` are for messages.

    Raises:
        WeightsError: Tensors are missing or of another shape.
    """
    with torch.device("meta"):
        shell: Any = build_model(architecture)
    with quiet():
        model, report = type(shell).from_pretrained(
            None,
            config=shell.config,
            state_dict=dict(state),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
        )
    mismatched = report["mismatched_keys"]
    if report["missing_keys"] or mismatched:
        faults = describe_faults(
            missing=sorted(report["missing_keys"]),
            unexpected=sorted(report["unexpected_keys"]),
            shapes=sorted(f"{k} {tuple(a)} instead of {tuple(b)}" for k, a, b in mismatched),
        )
        raise WeightsError(
            f"{path} does not fit {name}, a {type(model).__name__}: {faults}. Is it another "
            "model's file?"
        )
    loaded: nn.Module = model.eval().requires_grad_(False)
    return loaded


def with_text(name: str, architecture: Architecture, text: State) -> nn.Module:
    """Build a model with the text tower ``text``, and random weights in its vision tower.

    Raises:
        WeightsError: Keys are missing, unexpected or of another shape.
    """
    model = build_model(architecture)
    vision = {k: v for k, v in model.state_dict().items() if k.startswith(_VISION)}
    fit(name, "the text tower", {**vision, **text}, model)
    return model


def tower_in(model: Any, architecture: Architecture) -> TransformersTower:
    """Return the vision tower of a model; its modules are those of the model, not copies."""
    tower_class = TWO_TOWER_CLASSES.get(architecture["class"])
    if tower_class is None:
        return TransformersTower(model)
    if type(model.vision_model).__name__ == tower_class:
        return TransformersTower(model.vision_model)
    # CLIP's vision class with projection is not a child of the model: its parts are.
    with torch.device("meta"):
        tower = build_tower(architecture)
    for name, part in model.named_children():
        if name in tower._modules:
            tower._modules[name] = part
    return tower


def text_of(model: nn.Module, architecture: Architecture) -> dict[str, Tensor]:
    """Return the tensors outside the vision tower; empty without a text tower."""
    if architecture["class"] not in TWO_TOWER_CLASSES:
        return {}
    return {k: v for k, v in model.state_dict().items() if not k.startswith(_VISION)}


def encoder_of(model: Any, folder: Path | None) -> Callable[[Sequence[str]], Tensor] | None:
    """Return a function of K texts that computes L2-normalised embeddings [K, C].

    None if ``folder`` contains no tokenizer that can be loaded.
    """
    tokenizer = None if folder is None else _tokenizer(folder)
    if tokenizer is None:
        return None
    length = model.config.text_config.max_position_embeddings

    def encode(texts: Sequence[str]) -> Tensor:
        tokens = tokenizer(
            list(texts),
            padding="max_length",  # SigLIP pools the last token
            truncation=True,
            max_length=length,
            return_tensors="pt",
        ).to(next(model.text_model.parameters()).device)
        embeddings: Tensor = model.get_text_features(**tokens).pooler_output  # [K, C]
        return F.normalize(embeddings.float(), dim=1)

    return encode


def _tokenizer(folder: Path) -> Any:
    files = ("tokenizer.json", "vocab.json", "spiece.model")
    if not any((folder / name).is_file() for name in files):
        return None
    try:
        with quiet():
            return transformers_library().AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception:  # it needs a missing library, or has a format of another version
        return None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the library's log and progress bars; this package reports errors itself."""
    logs = transformers_library().utils.logging
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity(logs.CRITICAL)
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()
