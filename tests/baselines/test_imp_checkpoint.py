"""``--imp-rounds FILE``: an interrupted training continues to the same result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ovsprune.baselines.imp_weights import imp
from ovsprune.baselines.masked_training import MaskedTraining
from ovsprune.core.errors import DataError, OptionError, OutputError
from ovsprune.core.progress import Silent
from ovsprune.core.protocols import Backbone
from ovsprune.jobs.prune import prune
from tests.contracts.conftest import open_clip_vit
from tests.tiers import by_default

QUICK: dict[str, Any] = {"samples": 6, "batch_size": 4, "imp_steps": 2, "imp_lr": 1e-3}
RATIO = 0.3
"""Four rounds: 0.1, 0.19, 0.271, 0.3."""


def units(backbone: Backbone, ratio: float, **options: Any) -> Any:
    return prune(backbone, ratio, method="imp", imp_structured=True, **options)


@pytest.fixture(scope="module")
def small() -> Backbone:
    return open_clip_vit()


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[int]]:
    """Count rounds, and interrupt the given one."""
    original = MaskedTraining.run

    def until(number: int | None) -> list[int]:
        seen: list[int] = []

        def run(self: MaskedTraining, *rest: Any) -> Any:
            if len(seen) + 1 == number:
                raise KeyboardInterrupt
            seen.append(len(seen) + 1)
            return original(self, *rest)

        monkeypatch.setattr(MaskedTraining, "run", run)
        return seen

    return until


def assert_same(one: nn.Module, two: nn.Module) -> None:
    first, second = one.state_dict(), two.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("rewind", by_default([False, True], {True}))
@pytest.mark.parametrize("job", [imp, units])
def test_an_interrupted_training_continues_to_the_same_tower(
    small: Backbone, tmp_path: Path, trained: Any, job: Any, rewind: bool
) -> None:
    options = {**QUICK, "imp_rewind": rewind}
    whole = job(small, RATIO, **options)
    file = tmp_path / "rounds.safetensors"
    done = trained(3)
    with pytest.raises(KeyboardInterrupt):
        job(small, RATIO, imp_rounds=str(file), **options)
    assert len(done) == 2 and file.is_file()
    trained(None)
    progress = Silent()
    again = job(small, RATIO, imp_rounds=str(file), progress=progress, **options)
    assert any("training continues after round 2" in note for note in progress.notes)
    assert_same(whole.tower, again.tower)
    if job is imp:
        assert whole.rounds == again.rounds
        assert "imp_rounds" not in again.spec.to_json()


def test_a_larger_ratio_continues_from_a_smaller_one(
    small: Backbone, tmp_path: Path, trained: Any
) -> None:
    """Repeat the last round of the smaller ratio, which stopped at that ratio."""
    file = str(tmp_path / "rounds.safetensors")
    imp(small, 0.25, imp_rounds=file, **QUICK)
    done = trained(None)
    further = imp(small, 0.4, imp_rounds=file, **QUICK)
    assert len(done) == 3 and len(further.rounds) == 5
    assert_same(imp(small, 0.4, **QUICK).tower, further.tower)
    with pytest.raises(OptionError, match=r"has 4 rounds, which removed 0\.344 .* --ratio 0\.2:"):
        imp(small, 0.2, imp_rounds=file, **QUICK)


@pytest.fixture(scope="module", params=[imp, units])
def untrained(
    request: pytest.FixtureRequest, small: Backbone, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    """Return a job and its file of rounds without training. Tests must not change the file."""
    job: Any = request.param
    file = tmp_path_factory.mktemp("imp") / "rounds.safetensors"
    job(small, RATIO, imp_rounds=str(file), **{**QUICK, "imp_steps": 0})
    return job, file


@pytest.mark.parametrize(
    ("change", "said"), [({"seed": 1}, "seed"), ({"imp_lr": 1e-4}, "imp_lr"), ({"samples": 5}, "")]
)
def test_another_training_is_refused(
    small: Backbone, untrained: tuple[Any, Path], change: dict[str, Any], said: str
) -> None:
    job, file = untrained
    content = file.read_bytes()
    with pytest.raises(DataError, match=f"trained with other inputs: .*{said}"):
        job(small, RATIO, imp_rounds=str(file), **{**QUICK, "imp_steps": 0, **change})
    assert file.read_bytes() == content


def test_units_continue_to_the_same_budget_only(small: Backbone, tmp_path: Path) -> None:
    file = str(tmp_path / "rounds.safetensors")
    options = {**QUICK, "imp_steps": 0}
    units(small, RATIO, imp_rounds=file, **options)
    with pytest.raises(DataError, match="target is"):
        units(small, 0.4, imp_rounds=file, **options)


def test_a_path_that_cannot_be_written_is_refused_before_any_work(
    small: Backbone, tmp_path: Path, trained: Any
) -> None:
    done = trained(None)
    with pytest.raises(OutputError, match="pass a file to --imp-rounds"):
        imp(small, RATIO, imp_rounds=str(tmp_path), **QUICK)
    assert not done


def test_the_file_of_rounds_belongs_to_imp(small: Backbone) -> None:
    with pytest.raises(OptionError, match="--imp-rounds belongs to --method imp"):
        prune(small, RATIO, imp_rounds="rounds.safetensors", samples=6)
