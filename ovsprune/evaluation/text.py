"""Class embeddings, from a file or from a text encoder."""

from __future__ import annotations

import difflib
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ovsprune.core.errors import DataError

__all__ = ["DEFAULT_TEMPLATES", "encode_names", "read_embeddings"]

DEFAULT_TEMPLATES: tuple[str, ...] = ("a photo of a {}",)
"""Prompt templates; ``{}`` stands for the class name."""


def read_embeddings(path: Path | str, names: Sequence[str]) -> Tensor:
    """Read class embeddings from a file.

    Args:
        path: An ``.npz`` file with ``names`` (n strings) and ``emb`` (floats [n, C]).
        names: The classes, in the order of the result.

    Returns:
        Unit-length embeddings, float32 [len(names), C].

    Raises:
        DataError: The file cannot be read, has another form, or lacks a name.
    """
    path = Path(path)
    # TypeError and AttributeError: a plain .npy is an array, which is no context manager.
    errors = OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, AttributeError, TypeError
    try:
        with np.load(path, allow_pickle=False) as content:  # a pickled array could run code
            stored = [str(name) for name in content["names"].tolist()]
            vectors = np.asarray(content["emb"], dtype=np.float32)
    except errors as error:
        raise DataError(
            f"{path} cannot be read as text embeddings ({error}): expected an .npz with the "
            "arrays names (strings) and emb (floats [n, C])"
        ) from error
    if vectors.ndim != 2 or len(vectors) != len(stored) or not np.isfinite(vectors).all():
        raise DataError(
            f"{path} contains {len(stored)} names and emb of shape {vectors.shape}: expected one "
            "finite vector per name"
        )
    rows = {name: i for i, name in enumerate(stored)}
    missing = [name for name in dict.fromkeys(names) if name not in rows]
    if missing:
        raise DataError(
            f"{path} has no embedding for {', '.join(_with_hint(m, stored) for m in missing)}: add "
            'an alias for each to classes.json ("aliases": {"class": "name in the file"})'
        )
    embeddings = torch.from_numpy(vectors[[rows[name] for name in names]])
    return torch.nn.functional.normalize(embeddings, dim=-1)


@torch.no_grad()
def encode_names(
    names: Sequence[str],
    encode: Callable[[Tensor], Tensor],
    tokenize: Callable[[list[str]], Tensor],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    batch_size: int = 256,
) -> Tensor:
    """Embed class names with a text encoder, averaged over the prompt templates.

    Args:
        names: The classes.
        encode: Function of tokens, int64 [n, L], that returns text features [n, C] (as
            ``CLIP.encode_text``).
        tokenize: Function of sentences that returns tokens, int64 [n, L].
        templates: Prompt templates with one ``{}`` for the name.
        batch_size: Number of sentences per batch.

    Returns:
        Unit-length embeddings, float32 [len(names), C], on the device of the encoder.

    Raises:
        DataError: There are no names, or a template does not contain ``{}`` exactly once.
    """
    if not names:
        raise DataError("no class names were given: give at least one")
    for template in templates or ("",):
        if template.count("{}") != 1:
            raise DataError(
                f"prompt template {template!r} must contain {{}} once, for the class name"
            )
    total: Tensor | None = None
    for template in templates:
        sentences = [template.format(name) for name in names]
        parts = [
            encode(tokenize(sentences[i : i + batch_size])).float()
            for i in range(0, len(sentences), batch_size)
        ]
        # CLIP's prompt ensemble: the mean of unit vectors, normalised again.
        embedded = torch.nn.functional.normalize(torch.cat(parts), dim=-1)  # [n, C]
        total = embedded if total is None else total + embedded
    assert total is not None
    return torch.nn.functional.normalize(total, dim=-1)


def _with_hint(name: str, known: Sequence[str]) -> str:
    """Quote a name, with the closest known one if there is any."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"{name!r} (closest: {close[0]!r})" if close else repr(name)
