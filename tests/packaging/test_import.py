"""``import ovsprune`` is light, and every public name can be imported."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys

import pytest

import ovsprune

HEAVY = (
    "torch",
    "torchvision",
    "torch_pruning",
    "open_clip",
    "transformers",
    "numpy",
    "scipy",
    "PIL",
    "safetensors",
    "matplotlib",
)


def loaded_after(code: str) -> list[str]:
    """Return the heavy modules that a new interpreter loads when it runs ``code``."""
    probe = (
        f"{code}\nimport json, sys\nprint(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=120
    )
    loaded: list[str] = json.loads(done.stdout.splitlines()[-1])
    return loaded


def run_command(*args: str) -> str:
    """Return code that runs the command line and catches its exit."""
    return (
        "from ovsprune.cli.main import main\n"
        f"try:\n    main({list(args)!r})\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code"
    )


def test_the_probe_sees_a_heavy_import() -> None:
    assert "safetensors" in loaded_after("import safetensors")


def test_import_is_light() -> None:
    assert loaded_after("import ovsprune; ovsprune.__version__; ovsprune.OvspruneError") == []


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["prune", "--help"]], ids=" ".join)
def test_help_is_light(args: list[str]) -> None:
    assert loaded_after(run_command(*args)) == []


@pytest.mark.parametrize("name", ovsprune.__all__)
def test_public_name_resolves(name: str) -> None:
    value = getattr(ovsprune, name)
    assert name in dir(ovsprune)
    assert name == "__version__" or value.__name__ == name


def test_every_lazy_name_is_public() -> None:
    assert set(ovsprune._HOMES) <= set(ovsprune.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'ovsprune' has no attribute 'prunes'"):
        ovsprune.prunes  # noqa: B018


def test_one_source_of_the_version() -> None:
    assert importlib.metadata.version("ovsprune") == ovsprune.__version__
