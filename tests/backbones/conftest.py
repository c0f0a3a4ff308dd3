"""What tests of models and weights share."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("Network is unreachable")

    place = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(place), raising=False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    return place
