"""The environments, and how one is made: what it does not have itself, it borrows."""

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
    """One environment.

    Attributes:
        packages: What pip installs in it.
        used_by: Frameworks that pin this.
        alone: Everything of its own, torch too: large, and run only when it is asked for. Else the
            packages come without what they need, which is taken from the present environment.
        source: Where open_clip's sources lie, in place of a release.
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
    """open_clip's own ``Attention`` as it is in a checkout of its development head."""
    return Environment((), "the development head", source=str(source.resolve() / "src"))


def prepare(environment: Environment, place: Path) -> Path:
    """Make the environment, unless it is there; its Python."""
    python, site = place / "bin" / "python", site_packages(place)
    wanted = {**asdict(environment), "python": sys.version, "base": sysconfig.get_path("purelib")}
    mark = place / "ready.json"
    if mark.exists() and json.loads(mark.read_text("utf-8")) == json.loads(json.dumps(wanted)):
        return python
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=False, symlinks=True)
    if environment.packages:
        install(site, *environment.packages, dependencies=environment.alone)
    borrowed = [environment.source] if environment.source else []
    if not environment.alone:
        borrowed.append(wanted["base"])
    # a path file's lines come after the environment's own packages, which so win
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    mark.write_text(json.dumps(wanted), encoding="utf-8")
    return python


def site_packages(place: Path) -> Path:
    """Where the packages of an environment lie."""
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(place)}))


def install(site: Path, *packages: str, dependencies: bool = False) -> None:
    """Put packages into an environment, whatever it borrows."""
    pip("install", "--upgrade", "--target", str(site), *packages, *_without(dependencies))


def wheel(root: Path, place: Path) -> Path:
    """The package's wheel, built from the checkout."""
    shutil.rmtree(place, ignore_errors=True)
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(place), str(root), *_without(False))
    (built,) = place.glob("*.whl")
    return built


def pip(*arguments: str) -> None:
    """The present environment's pip."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq", *arguments]
    subprocess.run(command, check=True)


def _without(dependencies: bool) -> tuple[str, ...]:
    return () if dependencies else ("--no-deps",)
