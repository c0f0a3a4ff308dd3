"""Fixtures: a small untrained CLIP and a slim checkpoint of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ovsprune.core.protocols import Backbone
from ovsprune.jobs.prune import prune
from tests.contracts.conftest import open_clip_vit


@pytest.fixture(scope="session")
def small_clip() -> Backbone:
    return open_clip_vit()


@pytest.fixture(scope="session")
def slim(small_clip: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("slim") / "half"
    prune(small_clip, 0.5, samples=4, criterion="magnitude", allocation="uniform",
          recovery="none", output=output)  # fmt: skip
    return output
