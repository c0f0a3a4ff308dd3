"""Statistics files: another ratio needs only the plan and the refit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ovsprune.calibration.survey import Survey
from ovsprune.core.errors import DataError, OptionError, OutputError
from ovsprune.core.protocols import Backbone
from ovsprune.jobs.prune import prune
from ovsprune.slim.config import dump
from tests.contracts.conftest import open_clip_vit

OPTIONS: dict[str, Any] = {"samples": 6, "batch_size": 3}


@pytest.fixture(scope="module")
def small() -> Backbone:
    return open_clip_vit()


@pytest.fixture
def surveys(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list with one entry per survey that is measured."""
    seen: list[int] = []
    real = Survey.run

    def run(self: Survey) -> Any:
        seen.append(1)
        return real(self)

    monkeypatch.setattr(Survey, "run", run)
    return seen


def test_another_ratio_measures_nothing_and_gives_the_same_tower(
    small: Backbone, tmp_path: Path, surveys: list[int]
) -> None:
    file = str(tmp_path / "statistics.safetensors")
    prune(small, 0.3, statistics=file, **OPTIONS)
    assert len(surveys) == 1
    stored = prune(small, 0.5, statistics=file, **OPTIONS)
    assert len(surveys) == 1
    fresh = prune(small, 0.5, **OPTIONS)
    assert len(surveys) == 2
    for name, tensor in fresh.tower.state_dict().items():
        assert torch.equal(tensor, stored.tower.state_dict()[name]), name


def test_another_allocation_reads_the_statistics(
    small: Backbone, tmp_path: Path, surveys: list[int]
) -> None:
    file = str(tmp_path / "statistics.safetensors")
    prune(small, 0.5, statistics=file, **OPTIONS)
    prune(small, 0.5, statistics=file, allocation="uniform", recovery="none", **OPTIONS)
    assert len(surveys) == 1


@pytest.mark.parametrize(
    ("change", "said"), [({"seed": 1}, "seed"), ({"criterion": "magnitude"}, "criterion")]
)
def test_statistics_of_another_origin_are_refused(
    small: Backbone, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    file = str(tmp_path / "statistics.safetensors")
    prune(small, 0.5, statistics=file, **OPTIONS)
    with pytest.raises(DataError, match=f"measured with other inputs.*{said}"):
        prune(small, 0.5, statistics=file, **{**OPTIONS, **change})


def test_statistics_of_another_activation_are_refused(small: Backbone, tmp_path: Path) -> None:
    """Refuse statistics of equal weights with another activation."""
    file = str(tmp_path / "statistics.safetensors")
    prune(small, 0.5, statistics=file, **OPTIONS)
    with pytest.raises(DataError, match="activation is 'quick_gelu' in the file and 'gelu' now"):
        prune(replace(small, activation="gelu"), 0.5, statistics=file, **OPTIONS)


@pytest.mark.parametrize("header", ["{", "[1]", "null"])
def test_a_file_without_an_origin_is_refused(small: Backbone, tmp_path: Path, header: str) -> None:
    file = tmp_path / "statistics.safetensors"
    save_file({"costs/a": torch.zeros(1)}, file, {"ovsprune.statistics/1": header})
    with pytest.raises(DataError, match="does not record what it was measured on"):
        prune(small, 0.5, statistics=str(file), **OPTIONS)


def test_a_path_that_cannot_be_written_is_refused_before_any_work(
    small: Backbone, tmp_path: Path, surveys: list[int]
) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file" / "statistics.safetensors"):
        with pytest.raises(OutputError, match="--statistics"):
            prune(small, 0.5, statistics=str(place), **OPTIONS)
    assert not surveys


def test_a_file_is_read_from_a_read_only_directory(
    small: Backbone, tmp_path: Path, surveys: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(tmp_path / "statistics.safetensors")
    prune(small, 0.3, statistics=file, **OPTIONS)
    monkeypatch.setattr("os.access", lambda *_: False)
    prune(small, 0.5, statistics=file, **OPTIONS)
    assert len(surveys) == 1


def test_the_file_is_not_in_the_checkpoints_command(small: Backbone, tmp_path: Path) -> None:
    file = str(tmp_path / "statistics.safetensors")
    done = prune(small, 0.5, statistics=file, output=tmp_path / "slim", **OPTIONS)
    assert "statistics" not in dump(done.spec)


def test_later_rounds_measure_the_cut_tower(
    small: Backbone, tmp_path: Path, surveys: list[int]
) -> None:
    file = str(tmp_path / "statistics.safetensors")
    prune(small, 0.3, statistics=file, **OPTIONS)
    prune(small, 0.5, statistics=file, rounds=2, **OPTIONS)
    assert len(surveys) == 2


def test_rounds_with_a_latency_budget_are_refused(small: Backbone) -> None:
    with pytest.raises(OptionError, match="--rounds 2 goes with --budget macs or params"):
        prune(small, 0.5, rounds=2, budget="latency", **OPTIONS)
