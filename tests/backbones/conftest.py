"""Fixtures for tests of models and weights."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set up an empty hub cache without a network, and return its path."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("Network is unreachable")

    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(cache), raising=False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    return cache
