"""A model of transformers with its weights: its vision tower, and the text tower beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ovsprune.backbones.fitting import fit
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
"""What a model with a text tower calls the parts of its vision tower."""

Architecture = Mapping[str, Any]
State = Mapping[str, Tensor]


def filled(name: str, at: Path, architecture: Architecture, state: State) -> nn.Module:
    """The model with the weights of ``state``, in float32.

    transformers' own loading puts the names that older versions wrote right. What the model has no
    place for (a classifier, the other tower) is left out.

    Args:
        name: What the model is called, for messages.
        at: Where the weights come from, for messages.
        architecture: Of the model.
        state: By the names of the file.

    Raises:
        WeightsError: Tensors are missing or of other shapes.
    """
    with torch.device("meta"):
        shell: Any = build_model(architecture)
    with quiet():
        model, found = type(shell).from_pretrained(
            None,
            config=shell.config,
            state_dict=dict(state),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,
        )
    shapes = [f"{k} {tuple(a)} instead of {tuple(b)}" for k, a, b in found["mismatched_keys"]]
    faults = {
        "missing": sorted(found["missing_keys"]),
        "unexpected": sorted(found["unexpected_keys"]),
        "of another shape": sorted(shapes),
    }
    if faults["missing"] or shapes:
        said = "; ".join(
            f"{len(v)} {kind} ({', '.join(v[:3])}{', ...' if len(v) > 3 else ''})"
            for kind, v in faults.items()
            if v
        )
        raise WeightsError(
            f"{at} does not fit {name}, a {type(model).__name__}: {said}. Is it another model's "
            "file?"
        )
    whole: nn.Module = model.eval().requires_grad_(False)
    return whole


def with_text(name: str, architecture: Architecture, text: State) -> nn.Module:
    """A model with the text tower ``text``, and random weights in its vision tower.

    Raises:
        WeightsError: Keys are missing, unexpected or of other shapes.
    """
    model = build_model(architecture)
    vision = {k: v for k, v in model.state_dict().items() if k.startswith(_VISION)}
    fit(name, "the text tower", {**vision, **text}, model)
    return model


def tower_in(model: Any, architecture: Architecture) -> TransformersTower:
    """The vision tower of a model, its own modules and not copies."""
    wanted = TWO_TOWER_CLASSES.get(architecture["class"])
    if wanted is None:
        return TransformersTower(model)
    if type(model.vision_model).__name__ == wanted:
        return TransformersTower(model.vision_model)
    with torch.device("meta"):
        tower = build_tower(architecture)
    for name, part in model.named_children():
        if name in tower._modules:
            tower._modules[name] = part
    return tower


def text_of(model: nn.Module, architecture: Architecture) -> dict[str, Tensor]:
    """State of everything beside the vision tower; empty without a text tower."""
    if architecture["class"] not in TWO_TOWER_CLASSES:
        return {}
    return {k: v for k, v in model.state_dict().items() if not k.startswith(_VISION)}


def encoder_of(model: Any, folder: Path | None) -> Callable[[Sequence[str]], Tensor] | None:
    """Texts to L2-normalised embeddings [K, C], or None if no tokenizer lies in ``folder``."""
    tokenizer = None if folder is None else _tokenizer(folder)
    if tokenizer is None:
        return None
    length = model.config.text_config.max_position_embeddings

    def encode(texts: Sequence[str]) -> Tensor:
        tokens = tokenizer(
            list(texts),
            padding="max_length",  # SigLIP reads the last token
            truncation=True,
            max_length=length,
            return_tensors="pt",
        ).to(next(model.text_model.parameters()).device)
        embeddings: Tensor = model.get_text_features(**tokens).pooler_output
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
    except Exception:  # needs a library that is not here, or is of no form that this version reads
        return None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the library's log and its bars off the screen: our own messages say what matters."""
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
