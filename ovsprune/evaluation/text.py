"""Class embeddings: from a file of vectors, or from a text encoder."""

from __future__ import annotations

import difflib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ovsprune.core.errors import DataError

__all__ = ["DEFAULT_TEMPLATES", "encode_names", "read_embeddings"]

DEFAULT_TEMPLATES: tuple[str, ...] = ("a photo of a {}",)


def read_embeddings(
    path: Path | str, names: Sequence[str], aliases: Mapping[str, str] | None = None
) -> Tensor:
    """Reads class embeddings from a file.

    Args:
        path: An ``.npz`` with ``names`` (n strings) and ``emb`` (floats of shape [n, C]).
        names: The classes, in the wanted order.
        aliases: Class name to the name under which the file has it; others are looked up as they
            are.

    Returns:
        Unit-length embeddings, float32 [len(names), C].

    Raises:
        DataError: If the file cannot be read, is not of that form, or lacks a name.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as content:
            known = [str(name) for name in content["names"].tolist()]
            vectors = np.asarray(content["emb"], dtype=np.float32)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise DataError(
            f"{path} cannot be read as text embeddings ({error}): expected an .npz with the "
            "arrays names (strings) and emb (floats [n, C])"
        ) from error
    if vectors.ndim != 2 or len(vectors) != len(known) or not np.isfinite(vectors).all():
        raise DataError(
            f"{path} holds {len(known)} names and emb of shape {vectors.shape}: expected one "
            "finite vector a name"
        )
    rows = {name: i for i, name in enumerate(known)}
    wanted = [(aliases or {}).get(name, name) for name in names]
    missing = [name for name in dict.fromkeys(wanted) if name not in rows]
    if missing:
        raise DataError(
            f"{path} has no embedding for {', '.join(_with_hint(m, known) for m in missing)}: add "
            'an alias for each to classes.json ("aliases": {"class": "name in the file"})'
        )
    chosen = torch.from_numpy(vectors[[rows[name] for name in wanted]])
    return torch.nn.functional.normalize(chosen, dim=-1)


@torch.no_grad()
def encode_names(
    names: Sequence[str],
    encode: Callable[[Tensor], Tensor],
    tokenize: Callable[[list[str]], Tensor],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    batch_size: int = 256,
) -> Tensor:
    """Embeds class names with a text encoder; the mean over the templates.

    Args:
        names: The classes.
        encode: Tokens, int64 [n, L], to text features [n, C] (as ``CLIP.encode_text``).
        tokenize: Sentences to tokens, int64 [n, L].
        templates: Sentences with one ``{}`` for the name.
        batch_size: Sentences at a time.

    Returns:
        Unit-length embeddings, float32 [len(names), C], on the device of the encoder.

    Raises:
        DataError: If there are no names or a template has no place for the name.
    """
    if not names:
        raise DataError("no class names were given: give at least one")
    for template in templates or ("",):
        if template.count("{}") != 1:
            raise DataError(f"prompt template {template!r} must hold {{}} once, for the class name")
    total: Tensor | None = None
    for template in templates:
        sentences = [template.format(name) for name in names]
        parts = [
            encode(tokenize(sentences[i : i + batch_size])).float()
            for i in range(0, len(sentences), batch_size)
        ]
        embedded = torch.nn.functional.normalize(torch.cat(parts), dim=-1)
        total = embedded if total is None else total + embedded
    assert total is not None
    return torch.nn.functional.normalize(total, dim=-1)


def _with_hint(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"{name!r} (closest: {close[0]!r})" if close else repr(name)
