"""Errors, interruption and imports of the command line, for every command."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from ovsprune.cli import main as cli
from ovsprune.cli.silence import silence_libraries
from ovsprune.core.errors import CheckpointError
from ovsprune.core.options import options_of
from ovsprune.jobs import inspect as inspect_job
from ovsprune.pruning.config import PruneConfig

CONTEXT = click.Context(cli.main, info_name="ovsprune")


@pytest.fixture
def run():
    def call(*args: str):
        return CliRunner().invoke(cli.main, [str(arg) for arg in args])

    return call


@pytest.fixture
def failing(monkeypatch):
    """Make `ovsprune inspect` raise."""

    def install(error: BaseException) -> None:
        def fail(directory, recipe):
            raise error

        monkeypatch.setattr(inspect_job, "inspect", fail)

    return install


def test_user_error_is_one_message_and_status_2(run, failing):
    failing(CheckpointError("it is damaged; copy it again"))
    result = run("inspect", "x")
    assert result.exit_code == 2
    assert result.stderr == "Error: it is damaged; copy it again\n"
    assert result.stdout == ""


@pytest.mark.parametrize("way", ["option", "variable"])
def test_debug_shows_the_traceback(run, failing, monkeypatch, way):
    failing(CheckpointError("it is damaged"))
    if way == "variable":
        monkeypatch.setenv("OVSPRUNE_DEBUG", "1")
    result = run("inspect", "x", *(["--debug"] if way == "option" else []))
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("Error: it is damaged\n")


def test_bug_keeps_its_traceback(run, failing):
    failing(ZeroDivisionError("a bug"))
    assert isinstance(run("inspect", "x").exception, ZeroDivisionError)


def test_interrupt_has_status_130(run, failing):
    failing(KeyboardInterrupt())
    result = run("inspect", "x")
    assert result.exit_code == 130
    assert result.stderr.strip() == "Stopped."


def test_unknown_command_names_the_closest(run):
    result = run("prunee")
    assert result.exit_code == 2
    assert "unknown command 'prunee'. Did you mean 'prune'?" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["prune", "--model", "tiny"], "--ratio is missing: give --ratio"),
        (["prune", "--ratio", "0.5"], "--model is missing: give a name"),
        (["prune", "--model", "tiny", "--ratio", "half"], "'half' is not a valid float"),
        (["prune", "--model", "tiny", "--ratioo", "0.5"], "No such option"),
        (["inspect"], "Missing argument 'DIR'"),
        (["--nonsense"], "No such option"),
    ],
)
def test_usage_errors(run, args, message):
    result = run(*args)
    assert result.exit_code == 2
    assert message in result.stderr


def test_options_are_read_from_the_environment(run, monkeypatch):
    monkeypatch.setenv("OVSPRUNE_PRUNE_SAMPLES", "many")
    result = run("prune", "--model", "tiny", "--ratio", "0.5")
    assert result.exit_code == 2
    assert "Invalid value for '--samples': 'many'" in result.stderr


def test_help_lists_every_command_with_a_summary(run):
    result = run("--help")
    assert result.exit_code == 0
    for name in cli.COMMANDS:
        line = next(x for x in result.stdout.splitlines() if x.startswith(f"  {name} "))
        assert line.endswith(".") and not line.endswith("...")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command(run, name):
    result = run(name, "--help")
    assert result.exit_code == 0
    for option in ("--json", "--quiet", "--debug"):
        assert option in result.stdout


def _accepted(job: object) -> dict[str, object]:
    return {p.name: p.default for p in inspect.signature(job).parameters.values()}


REQUIRED = {
    "prune": ["--model", "tiny", "--ratio", "0.5"],
    "transfer": ["--target", "san"],
    "evaluate": ["--model", "tiny"],
    "benchmark": ["--model", "tiny"],
    "demo": [],
}


@pytest.mark.parametrize("name", REQUIRED)
def test_option_defaults_equal_those_of_the_function(name):
    module = importlib.import_module(f"ovsprune.jobs.{name}")
    accepted = _accepted(getattr(module, name))
    if name == "prune":
        accepted |= {o.name: o.default for o in options_of(PruneConfig)} | {"recipe": None}
    command = cli.main.get_command(CONTEXT, name)
    given = command.make_context(name, REQUIRED[name]).params
    given = {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
    assert len(given) >= 5
    if name == "prune":  # The job's depends on torch, which the command line does not import.
        assert given.pop("distill_optimizer") is None
    for option in ("json_to", "quiet", "debug", "model", "ratio", "target"):
        if name == "demo" and option == "ratio":
            continue
        given.pop(option, None)
    assert {option: accepted.get(option, "not taken") for option in given} == given


def test_help_imports_no_heavy_library():
    heavy = ("torch", "numpy", "open_clip", "PIL", "transformers", "safetensors")
    code = (
        "import sys\n"
        "from ovsprune.cli.main import main, COMMANDS\n"
        "for name in COMMANDS:\n"
        "    try:\n"
        "        main([name, '--help'])\n"
        "    except SystemExit as stop:\n"
        "        assert not stop.code\n"
        f"found = [name for name in {heavy!r} if name in sys.modules]\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--against" in done.stdout


def test_messages_of_libraries_are_suppressed(monkeypatch, capfd):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.delenv("HF_HUB_VERBOSITY", raising=False)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    with warnings.catch_warnings():
        silence_libraries(debug=False)
        logging.warning("open_clip says something on the root logger")
        warnings.warn("a library warns", stacklevel=1)
    assert capfd.readouterr().err == ""
    assert os.environ["HF_HUB_VERBOSITY"] == "critical"
    # What a user has set stays.
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"


def test_debug_keeps_messages_of_libraries(monkeypatch):
    monkeypatch.delenv("HF_HUB_VERBOSITY", raising=False)
    silence_libraries(debug=True)
    assert "HF_HUB_VERBOSITY" not in os.environ
