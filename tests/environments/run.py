"""Test that slim checkpoints attach in environments with other versions of open_clip.

    python tests/environments/run.py [--only NAME ...] [--all] [--head CHECKOUT] [--json FILE]

The script makes a virtual environment for each version (kept under ``.environments/``), installs
the package of this checkout in it without dependencies, and runs ``check.py`` in it. The exit
status is 1 if an output differs. The development head is not in the registry: it needs a checkout.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from environments import (
    ENVIRONMENTS,
    Environment,
    development_head,
    install,
    prepare,
    site_packages,
    wheel,
)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
HEAD = "open_clip-head"
WRONG = "wrong unit"  # the check that must differ


def chosen(options: argparse.Namespace) -> dict[str, Environment]:
    """Return the selected environments."""
    known = dict(ENVIRONMENTS)
    if options.head:
        known[HEAD] = development_head(options.head)
    unknown = [name for name in options.only if name not in known]
    if unknown:
        raise SystemExit(
            f"unknown: {', '.join(unknown)}; known: {', '.join(known)} ({HEAD}: --head)"
        )
    if options.only:
        return {name: known[name] for name in options.only}
    return {name: e for name, e in known.items() if options.all or not e.alone}


def checkpoints(cache: Path) -> Path:
    """Return the folder of the cases, which are made again if the package changes."""
    digest = hashlib.sha256()
    sources = (HERE / "cases.py", HERE / "checkpoints.py")
    for file in (*sorted(ROOT.glob("ovsprune/**/*.py")), *sources):
        digest.update(file.read_bytes())
    folder = cache / f"checkpoints-{digest.hexdigest()[:12]}"
    for old in cache.glob("checkpoints-*"):
        if old != folder:
            shutil.rmtree(old)
    command = [sys.executable, str(HERE / "checkpoints.py"), str(folder)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return folder


def check(name: str, environment: Environment, built: Path, made: Path, cache: Path) -> Any:
    """Run ``check.py`` in one environment and return its results."""
    directory = cache / name
    print(f"{name} ...", flush=True)
    python = prepare(environment, directory)
    install(site_packages(directory), str(built))
    result = directory / "result.json"
    result.unlink(missing_ok=True)
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    command = [str(python), str(HERE / "check.py"), str(made), str(result)]
    done = subprocess.run(command, cwd=directory, env=variables, check=False)
    if done.returncode or not result.exists():
        row = {"case": "all", "form": "", "check": "start", "error": float("nan"), "ok": False}
        return {"versions": {}, "rows": [{**row, "message": f"exit {done.returncode}"}]}
    return json.loads(result.read_text("utf-8"))


def table(records: dict[str, Any]) -> str:
    """Format one line per environment, case and form, with the largest error of equal outputs."""
    lines = [("environment", "case", "form", "checks", "largest error", WRONG, "")]
    for name, record in records.items():
        groups: dict[tuple[str, str], list[Any]] = {}
        for row in record["rows"]:
            groups.setdefault((row["case"], row["form"]), []).append(row)
        for (case, form), rows in groups.items():
            equal = [row["error"] for row in rows if row["check"] != WRONG]
            wrong = [f"{row['error']:.2f}" for row in rows if row["check"] == WRONG]
            state = "ok" if all(row["ok"] for row in rows) else "FAILED"
            largest = f"{max(equal):.1e}"
            lines.append((name, case, form, str(len(rows)), largest, "".join(wrong), state))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main() -> int:
    """Run the checks of the command line and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument("--all", action="store_true", help="also those with another torch")
    parser.add_argument("--head", type=Path, metavar="DIR", help="a checkout of open_clip's head")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the results")
    parser.add_argument("--cache", type=Path, default=ROOT / ".environments", metavar="DIR")
    options = parser.parse_args()
    environments = chosen(options)
    cache = options.cache.resolve()
    made = checkpoints(cache)
    built = wheel(ROOT, cache / "wheel")
    records = {n: check(n, e, built, made, cache) for n, e in environments.items()}
    for name, record in records.items():
        versions = ", ".join(f"{k} {v}" for k, v in record["versions"].items())
        print(f"\n{name}: {versions}")
    print(f"\n{table(records)}")
    failed = [(n, r) for n, record in records.items() for r in record["rows"] if not r["ok"]]
    for name, row in failed:
        print(
            f"{name}: {row['case']}, {row['form']}, {row['check']}: {row['error']} {row['message']}"
        )
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
