from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ovsprune.core.errors import DataError
from ovsprune.evaluation import encode_names, read_embeddings

NAMES = ["cow", "grass", "person"]


@pytest.fixture
def vectors(tmp_path: Path) -> Path:
    path = tmp_path / "text.npz"
    np.savez(path, names=np.array(NAMES), emb=np.diag([2.0, 3.0, 4.0]).astype(np.float16))
    return path


def test_embeddings_follow_the_requested_order(vectors: Path) -> None:
    found = read_embeddings(vectors, ["person", "cow"])
    assert torch.equal(found, torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))


def test_missing_names_are_listed_with_the_closest(vectors: Path) -> None:
    with pytest.raises(DataError, match="no embedding for 'gras' .closest: 'grass'., 'xyzzy': add"):
        read_embeddings(vectors, ["cow", "gras", "xyzzy"])


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere.npz cannot be read"):
        read_embeddings(tmp_path / "nowhere.npz", ["cow"])
    (tmp_path / "text.npz").write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match="cannot be read as text embeddings"):
        read_embeddings(tmp_path / "text.npz", ["cow"])
    np.save(tmp_path / "plain.npy", np.zeros((2, 4)))
    with pytest.raises(DataError, match="plain.npy cannot be read as text embeddings"):
        read_embeddings(tmp_path / "plain.npy", ["cow"])
    np.savez(tmp_path / "other.npz", vectors=np.zeros(3))
    with pytest.raises(DataError, match="expected an .npz with the arrays names"):
        read_embeddings(tmp_path / "other.npz", ["cow"])
    np.savez(tmp_path / "short.npz", names=np.array(NAMES), emb=np.zeros((2, 4)))
    with pytest.raises(DataError, match="3 names and emb of shape"):
        read_embeddings(tmp_path / "short.npz", ["cow"])
    np.savez(tmp_path / "nan.npz", names=np.array(NAMES), emb=np.full((3, 4), np.nan))
    with pytest.raises(DataError, match="finite"):
        read_embeddings(tmp_path / "nan.npz", ["cow"])


def test_a_pickle_in_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pickled.npz"
    np.savez(path, names=np.array(["cow", None], dtype=object), emb=np.zeros((2, 4)))
    with pytest.raises(DataError, match="cannot be read"):
        read_embeddings(path, ["cow"])


def fake_tokenize(sentences: list[str]) -> torch.Tensor:
    return torch.tensor([[len(s), s.count("a")] for s in sentences])


def test_encoding_averages_unit_vectors_over_the_templates() -> None:
    templates = ("a {}", "{} in a banana bath")
    found = encode_names(["cow", "cat"], lambda t: t.double(), fake_tokenize, templates, 1)
    parts = [
        torch.nn.functional.normalize(fake_tokenize([t.format(n) for n in ("cow", "cat")]).float())
        for t in templates
    ]
    expected = torch.nn.functional.normalize(parts[0] + parts[1])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2))


def test_encoding_errors() -> None:
    with pytest.raises(DataError, match="no class names"):
        encode_names([], lambda t: t, fake_tokenize)
    with pytest.raises(DataError, match="template 'a photo' must contain"):
        encode_names(["cow"], lambda t: t, fake_tokenize, ("a photo",))
