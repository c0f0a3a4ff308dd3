"""Small untrained CLIP, a slim checkpoint of it, and rendered images that are made once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

from ovsprune.calibration import pictures
from ovsprune.core.protocols import Backbone
from ovsprune.graph import costs
from ovsprune.jobs.prune import prune
from tests.contracts.conftest import open_clip_vit


@pytest.fixture(scope="session", autouse=True)
def _rendered_once() -> Iterator[None]:
    """Render each calibration image once per process: it depends on its arguments only.

    Rendering is about a third of the cost of a prune with the small towers of these tests. The
    tests of the renderers call them directly.
    """

    def once(render: pictures.Render) -> pictures.Render:
        cached = lru_cache(maxsize=4096)(render)
        return lambda index, seed, size: cached(index, seed, size).copy()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "RENDERED", {k: once(v) for k, v in pictures.RENDERED.items()})
        yield


@pytest.fixture(scope="session", autouse=True)
def _counted_on_cpu() -> Iterator[None]:
    """Count the costs of towers on the CPU, where small ones take a third of the time.

    torch derives many shapes of meta tensors in Python. ``tests/graph/test_costs.py`` checks that
    both devices give the same counts.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "COUNT_ON", "cpu")
        yield


@pytest.fixture(scope="session")
def small_clip() -> Backbone:
    return open_clip_vit()


@pytest.fixture(scope="session")
def slim(small_clip: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("slim") / "half"
    prune(small_clip, 0.5, samples=4, criterion="magnitude", allocation="uniform",
          recovery="none", output=output)  # fmt: skip
    return output
