"""Virtual environments with other versions of open_clip; other packages are shared."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Environment:
    """Virtual environment.

    Attributes:
        packages: Packages that pip installs in it.
        used_by: Frameworks that pin these versions.
        alone: If true, all dependencies are installed, torch too; such an environment is large and
            optional. If false, dependencies come from the current environment.
        source: Folder of open_clip's source code, instead of a release.
    """

    packages: tuple[str, ...]
    used_by: str
    alone: bool = False
    source: str | None = None


ENVIRONMENTS = {
    "open_clip-2.16": Environment(("open_clip_torch==2.16.0",), "SAN, MAFT+"),
    "open_clip-2.20": Environment(("open_clip_torch==2.20.0",), "EBSeg"),
    "open_clip-2.24": Environment(("open_clip_torch==2.24.0",), "FC-CLIP"),
    "open_clip-3.3": Environment(("open_clip_torch==3.3.0",), "ovsprune"),
    "torch-2.0.1": Environment(
        (
            "torch==2.0.1",
            "torchvision==0.15.2",
            "open_clip_torch==2.16.0",
            "timm",
            "safetensors",
            "numpy<2",
            "setuptools<70",
        ),
        "environments of 2023",
        alone=True,
    ),
}


def development_head(source: Path) -> Environment:
    """Return the environment of a checkout of open_clip's development head."""
    return Environment((), "the development head", source=str(source.resolve() / "src"))


def prepare(environment: Environment, directory: Path) -> Path:
    """Make the environment if it does not exist, and return its Python."""
    python, site = directory / "bin" / "python", site_packages(directory)
    expected = {**asdict(environment), "python": sys.version, "base": sysconfig.get_path("purelib")}
    mark = directory / "ready.json"
    if mark.exists() and json.loads(mark.read_text("utf-8")) == json.loads(json.dumps(expected)):
        return python
    shutil.rmtree(directory, ignore_errors=True)
    venv.create(directory, with_pip=False, symlinks=True)
    if environment.packages:
        install(site, *environment.packages, dependencies=environment.alone)
    shared = [environment.source] if environment.source else []
    if not environment.alone:
        shared.append(expected["base"])
    # Entries of a path file follow the environment's packages, which therefore take precedence.
    (site / "shared.pth").write_text("\n".join(shared) + "\n", encoding="utf-8")
    mark.write_text(json.dumps(expected), encoding="utf-8")
    return python


def site_packages(directory: Path) -> Path:
    """Return the folder of an environment's packages."""
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(directory)}))


def install(site: Path, *packages: str, dependencies: bool = False) -> None:
    """Install packages in an environment, also those that it shares."""
    pip("install", "--upgrade", "--target", str(site), *packages, *_without(dependencies))


def wheel(root: Path, directory: Path) -> Path:
    """Build the wheel of the package from the checkout."""
    shutil.rmtree(directory, ignore_errors=True)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(directory), str(root), *_without(False))
    (built,) = directory.glob("*.whl")
    return built


def pip(*arguments: str) -> None:
    """Run pip of the current environment."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq", *arguments]
    subprocess.run(command, check=True)


def _without(dependencies: bool) -> tuple[str, ...]:
    return () if dependencies else ("--no-deps",)
