"""Recipes: options of a checkpoint in a file, which reproduces the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ovsprune
from ovsprune.cli.main import main
from ovsprune.core.errors import OptionError, UnknownNameError
from ovsprune.importance.taylor import Taylor
from ovsprune.jobs.prune import prune
from ovsprune.pruning.config import PruneConfig
from ovsprune.pruning.recipes import read_base, recipe_of
from tests.contracts.conftest import open_clip_vit


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a slim checkpoint with several options, and its recipe."""
    place = tmp_path_factory.mktemp("recipes")
    words = ["--samples", 4, "--batch-size", 4, "--criterion", "magnitude", "--seed", 2]
    words += ["--allocation", "uniform", "--recovery", "closed-form"]
    words += ["--protect", "*.0.*", "--dtype", "float16", "--no-text", "--uniform-heads"]
    assert not run("prune", "--model", "tiny", "--ratio", 0.3, *words, "-o", place / "slim")
    assert not run("inspect", place / "slim", "--recipe", place / "recipe.toml")
    return place


def test_a_recipe_reproduces_the_checkpoint(made: Path, tmp_path: Path) -> None:
    assert not run("prune", "--config", made / "recipe.toml", "-o", tmp_path / "again")
    first, second = ovsprune.read(made / "slim"), ovsprune.read(tmp_path / "again")
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert tensor.dtype == second.tensors[name].dtype
        assert torch.equal(tensor, second.tensors[name])
    assert first.spec.provenance == second.spec.provenance
    assert not any(name.startswith("text") for name in second.tensors)


def test_the_command_line_overrides_the_recipe(made: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["--ratio", 0.2, "--no-uniform-heads", "--dtype", "float32", "--seed", 0]
    assert not run("prune", "--config", made / "recipe.toml", *words, "-o", tmp_path / "other")
    found = ovsprune.read(tmp_path / "other")
    assert (found.spec.provenance["ratio"], found.spec.provenance["seed"]) == (0.2, 0)
    assert not found.spec.provenance["uniform_heads"]
    assert all(t.dtype != torch.float16 for t in found.tensors.values())


def test_a_recipe_names_the_model(made: Path) -> None:
    assert read_base(made / "recipe.toml") == {"model": "tiny", "dtype": "float16", "text": False}
    config = PruneConfig.from_file(made / "recipe.toml")
    assert (config.criterion, config.protect) == ("magnitude", ("*.0.*",))
    assert (config.batch_size, config.calibration) == (4, "procedural")


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("[base]\nmodle = 'tiny'", UnknownNameError, "Did you mean 'model'"),
        ("[base]\nmodel = 3", OptionError, r"model in \[base\] is 3; give a text in quotes"),
        ("base = 3", OptionError, r"give a table \[base\]"),
    ],
)
def test_a_wrong_base_is_refused(
    tmp_path: Path, text: str, error: type[Exception], said: str
) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    with pytest.raises(error, match=said):
        read_base(file)


def test_options_that_are_not_recorded_must_be_given_again(tmp_path: Path) -> None:
    from PIL import Image

    small = open_clip_vit()
    (tmp_path / "images").mkdir()
    for i in range(80):
        Image.new("RGB", (32, 32), (i, 2 * i, 3 * i)).save(tmp_path / "images" / f"{i:02}.png")
    quick: dict[str, Any] = {"samples": 4, "batch_size": 4, "probe": 2, "allocation": "uniform"}
    calibration = str(tmp_path / "images")
    spec = prune(small, 0.3, calibration=calibration, criterion="magnitude", **quick).spec
    with pytest.raises(OptionError, match="--calibration is missing: the images came from a fold"):
        PruneConfig.from_provenance(spec.provenance)
    config = PruneConfig.from_provenance(spec.provenance, calibration=calibration)
    assert (config.calibration, config.probe, config.batch_size) == (calibration, 2, 4)
    slim = prune(small, 0.3, criterion=Taylor(), output=tmp_path / "slim", **quick).path
    with pytest.raises(OptionError, match="'Taylor' is no registered name"):
        recipe_of(ovsprune.read(slim))


def test_a_recipe_of_iterative_magnitude_pruning(tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": "imp", "imp_structured": True, "imp_steps": 1}
    quick: dict[str, Any] = {"samples": 4, "batch_size": 4}
    first = prune(open_clip_vit(), 0.3, **options, **quick, imp_rounds=str(tmp_path / "rounds"))
    config = PruneConfig.from_provenance(first.spec.provenance)
    config.to_file(tmp_path / "recipe.toml")
    config = PruneConfig.from_file(tmp_path / "recipe.toml")
    assert (config.method, config.imp.steps, config.imp.structured) == ("imp", 1, True)
    assert config.imp.rounds is None
    again = prune(open_clip_vit(), config=config)
    for name, tensor in first.tower.state_dict().items():
        assert torch.equal(tensor, again.tower.state_dict()[name])
