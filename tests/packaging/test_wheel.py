"""Built wheel: its content, and its command in an environment without heavy libraries."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import ovsprune

ROOT = Path(__file__).parents[2]
# All that `ovsprune --help` may need.
LIGHT = ("click", "rich", "markdown-it-py", "mdurl", "pygments")


def pip(*args: str | Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--quiet",
        *map(str, args),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    built = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", built, ROOT)
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def empty(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create an environment with only the wheel and what its command line needs."""
    place = tmp_path_factory.mktemp("empty")
    venv.create(place, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(place)}))
    for name in LIGHT:
        copy_distribution(name, site)
    pip("--python", place, "install", "--no-deps", "--no-compile", "--no-index", wheel)
    return place


def copy_distribution(name: str, site: Path) -> None:
    for file in importlib.metadata.files(name) or ():
        if ".." not in file.parts and "__pycache__" not in file.parts:
            target = site / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(str(file.locate()), target)


def run_in(empty: Path, *command: str) -> subprocess.CompletedProcess[str]:
    (program,) = empty.glob(f"*/{command[0]}")
    return subprocess.run(
        [str(program), *command[1:]], capture_output=True, text=True, timeout=120, cwd=empty, env={}
    )


def test_version(wheel: Path) -> None:
    assert wheel.name.startswith(f"ovsprune-{ovsprune.__version__}-py3-none-any")


@pytest.mark.parametrize(
    "name",
    [
        "ovsprune/py.typed",
        "ovsprune/slim/schema.json",
        "ovsprune/assets/tiny/open_clip_config.json",
        "ovsprune/assets/tiny/open_clip_model.safetensors",
        "ovsprune/assets/tiny/README.md",
    ],
)
def test_wheel_holds(wheel: Path, name: str) -> None:
    assert name in zipfile.ZipFile(wheel).namelist()


def test_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "ovsprune").rglob("*.py")}
    assert names >= sources
    assert {name.split("/")[0] for name in names} == {"ovsprune"}


def test_wheel_carries_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (licence,) = (n for n in archive.namelist() if n.endswith("licenses/LICENSE"))
        assert b"Apache License" in archive.read(licence)


def test_help_in_an_empty_environment(empty: Path) -> None:
    done = run_in(empty, "ovsprune", "--help")
    assert done.returncode == 0, done.stderr
    assert "prune" in done.stdout and "transfer" in done.stdout


def test_the_empty_environment_has_no_torch(empty: Path) -> None:
    done = run_in(empty, "python", "-c", "import ovsprune, torch")
    assert "No module named 'torch'" in done.stderr
