"""Options with one declaration: a new option appears everywhere without a second edit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from ovsprune.cli.config_options import config_options, given_options
from ovsprune.comparison.methods import parse_options
from ovsprune.core.errors import OptionError, UnknownNameError
from ovsprune.core.option_docs import options_table
from ovsprune.core.options import option, options_of
from ovsprune.pruning.command_line import command_of
from ovsprune.pruning.config import PruneConfig
from tests.contracts.conftest import open_clip_vit

DOCS = Path(__file__).parents[2] / "docs"


@dataclass(frozen=True, kw_only=True)
class Extended(PruneConfig):
    """Configuration with one additional option."""

    sharpness: float = option(
        1.0,
        above=0,
        methods=("--method default",),
        measured=True,
        compare="method",
        help="Dummy option of a test.",
    )


def run(*words: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Parse a command line and return the options that were given."""
    given: dict[str, Any] = {}

    @click.command(context_settings={"auto_envvar_prefix": "TEST"})
    @config_options(Extended)
    def command(**_: Any) -> None:
        given.update(given_options(Extended))

    result = CliRunner(env=environment).invoke(command, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return given or {"output": result.output}


def test_a_new_option_is_on_the_command_line() -> None:
    assert run("--sharpness", "2") == {"sharpness": 2.0}
    assert run("--sharpness", "1.0") == {"sharpness": 1.0}  # given, although it is the default
    assert run(environment={"TEST_SHARPNESS": "3"}) == {"sharpness": 3.0}
    assert "Dummy option of a test." in run("--help")["output"]


def test_a_new_option_is_documented() -> None:
    table = options_table(Extended)
    assert "| `sharpness` | number | `1.0` | Dummy option of a test. Above 0." in table


def test_a_new_option_is_checked() -> None:
    with pytest.raises(OptionError, match=r"--sharpness 0: give a finite number above 0"):
        Extended(ratio=0.5, sharpness=0.0).check()
    with pytest.raises(OptionError, match="--method imp does not take --sharpness"):
        Extended(ratio=0.5, sharpness=2.0, method="imp").check()


def test_a_new_option_is_recorded() -> None:
    config = Extended(ratio=0.5, sharpness=2.0)
    assert config.recorded()["sharpness"] == 2.0
    assert Extended.from_provenance(config.recorded(), calibration="mixed").sharpness == 2.0
    assert "--sharpness 2.0" in command_of(open_clip_vit(), config, "float32", True)


def test_a_new_option_is_an_option_of_a_compared_method() -> None:
    assert parse_options("default:sharpness=2", ["sharpness=2"], Extended) == {"sharpness": 2.0}


def test_a_new_option_changes_the_measurement_key() -> None:
    plain, other = (Extended(ratio=0.5, sharpness=s).measurement_key() for s in (1.0, 2.0))
    assert plain != other
    assert plain == Extended(ratio=0.7, recovery="none", rounds=2).measurement_key()


def test_a_new_option_is_in_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    Extended(ratio=0.5, sharpness=2.0).to_file(file)
    assert Extended.from_file(file).sharpness == 2.0
    assert Extended.from_file(file, sharpness=3.0).sharpness == 3.0


def test_every_option_has_a_help_text_and_a_valid_default() -> None:
    PruneConfig(ratio=0.5).check()
    for declared in options_of(PruneConfig):
        assert declared.help.endswith("."), declared.name
        assert f"{declared.name}: " in str(PruneConfig.__doc__)


def test_the_page_about_recipes_has_the_options() -> None:
    page = (DOCS / "recipes.md").read_text("utf-8")
    assert options_table(PruneConfig) in page, (
        "the table in docs/recipes.md is out of date: replace it by what "
        "print(options_table(PruneConfig)) prints"
    )


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("ratio = 2.0", OptionError, r"recipe.toml: --ratio 2 is outside \(0, 1\)"),
        ("ratio = 0.5\nsampels = 4", UnknownNameError, "recipe.toml: .*Did you mean 'samples'"),
        ("ratio = 0.5\n[distill]\nstep = 4", UnknownNameError, "Did you mean 'distill_steps'"),
        ("ratio = 0.5\nprotect = 'x'", OptionError, "--protect 'x': give a list of strings"),
        ("ratio = 0.5\nrounds = true", OptionError, "--rounds True: give a whole number"),
        ("ratio = 0.5\ncriterion = 'taylr'", OptionError, "--criterion .*'taylr' is no registered"),
        ("ratio = 0.5\ncriterion = 3", OptionError, "3 has no method `score`"),
        ("ratio = 0.5\ncalibration = 'folder'", OptionError, "--calibration is missing: the imag"),
        ("samples = 4", OptionError, "--ratio is missing"),
        ("ratio = ", OptionError, "--config .*recipe.toml is not valid TOML"),
    ],
)
def test_a_wrong_recipe_is_refused(
    tmp_path: Path, text: str, error: type[Exception], said: str
) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(text)
    with pytest.raises(error, match=said):
        PruneConfig.from_file(file)


def test_a_missing_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be read: No such file"):
        PruneConfig.from_file(tmp_path / "none.toml")


def test_tables_and_plain_keys_are_equivalent(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("ratio = 0.5\nrecovery = 'distill'\n[distill]\nsteps = 9\n")
    config = PruneConfig.from_file(file, distill_lr=1e-3, calibration="leaves")
    assert (config.distill.steps, config.distill.lr, config.calibration) == (9, 1e-3, "leaves")
    config.to_file(file)
    assert PruneConfig.from_file(file) == config
    config.check()


def test_lists_become_tuples() -> None:
    config = PruneConfig(ratio=0.5, protect=["*.0.*"])  # type: ignore[arg-type]
    assert config.protect == ("*.0.*",) and hash(config)
    assert replace(config, distill=config.distill) == config
