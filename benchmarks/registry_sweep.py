"""Prune every image tower in open_clip's registry to half, and verify the written checkpoints.

    python benchmarks/registry_sweep.py
    python benchmarks/registry_sweep.py --name RN50 --name ViT-B-32

Each name runs in a separate process. The process builds the tower (at its real size if that fits
into memory, otherwise with two blocks per stage), gives every parameter a random value, prunes it
to half by magnitude without recovery, and saves it. A new process loads the checkpoint without
other information. The result is ``ok`` if

- the ratio is met within 0.01,
- the largest error against the masked dense tower is at most 1e-4 of the standard deviation of the
  output, for the pooled and the dense output, and
- every loaded tensor equals the pruned one bit for bit.

The page also lists the fraction of the MACs that Torch-Pruning removes from the original tower when
half is requested.

Names that differ in the text tower only share an image tower, which is measured once; their rows
name the model under which it was measured. Small towers come first. Each row is stored in
``registry_sweep.json`` when it is done; an interrupted run resumes there. The page is
``registry_sweep.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import open_clip
import timm
from registry_one import fits, params_of

from ovsprune.core.files import write_text
from ovsprune.report.numbers import count

HERE = Path(__file__).resolve().parent
RECORD, PAGE = HERE / "registry_sweep.json", HERE / "registry_sweep.md"
LIMIT = 7200
"""Seconds for one name."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--name", action="append", help="only these, again")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1, help="towers at a time")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--retry", action="store_true", help="those that are not ok, again")
    chosen = parser.parse_args(arguments)
    names = open_clip.list_models()
    rows = {row["name"]: row for row in _stored() if row["name"] in names}
    if chosen.retry:
        rows = {name: row for name, row in rows.items() if row["status"] == "ok"}
    lock = Lock()

    def measure(name: str) -> None:
        with lock:
            twin = next((n for n in rows if n != name and tower_of(n) == tower_of(name)), None)
        if twin and not chosen.name:
            row = rows[twin] | {"name": name, "same_as": rows[twin]["same_as"] or twin}
        else:
            row = one(name, chosen.threads, chosen.work)
        with lock:
            rows[name] = row
            print(json.dumps(row), flush=True)
            _write([rows[n] for n in names if n in rows])

    wanted = chosen.name or sorted(set(names) - set(rows), key=size_of)
    first = {tower_of(name): name for name in reversed(wanted)}.values()
    with ThreadPoolExecutor(chosen.jobs) as pool:
        for part in (
            [name for name in wanted if name in first],
            [name for name in wanted if name not in first],
        ):
            list(pool.map(measure, part))
    _write([rows[n] for n in names if n in rows])


def size_of(name: str) -> int:
    """Parameters that are built, about: a tower that is shortened is small."""
    params = params_of(name)
    return params if fits(params) else params // 20


def tower_of(name: str) -> str:
    """What decides how a name's image tower is built: equal texts are the same tower."""
    config = open_clip.get_model_config(name)
    vision = {k: v for k, v in config["vision_cfg"].items() if k != "timm_model_pretrained"}
    parts = [config["embed_dim"], vision, config.get("quick_gelu", False)]
    return json.dumps(parts, sort_keys=True)


def _stored() -> list[dict[str, Any]]:
    return json.loads(RECORD.read_text())["rows"] if RECORD.is_file() else []


def one(name: str, threads: int, work: Path) -> dict[str, Any]:
    """A name's row, whatever becomes of the process that makes it."""
    start = time.perf_counter()
    row = {"name": name, "status": "no", "reason": None, "dense": None, "slim": None}
    row |= {"max_error": None, "blocks": None, "stock": None, "torch": None, "same_as": None}
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory(dir=work) as folder:
        command = [sys.executable, str(HERE / "registry_one.py"), name, folder]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=LIMIT, env=environment, check=False
            )
            found = json.loads(done.stdout.strip().splitlines()[-1])
            row |= found
        except subprocess.TimeoutExpired:
            row["reason"] = f"took more than {LIMIT} s"
        except (IndexError, json.JSONDecodeError):
            lines = done.stderr.strip().splitlines()
            row["reason"] = lines[-1] if lines else f"ended with {done.returncode}"
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def _write(rows: Sequence[dict[str, Any]]) -> None:
    record = {
        "open_clip": open_clip.__version__,
        "timm": timm.__version__,
        "rows": list(rows),
    }
    write_text(RECORD, json.dumps(record, indent=1) + "\n")
    write_text(PAGE, "\n".join(_page(record)) + "\n")


def _page(record: dict[str, Any]) -> Iterator[str]:
    rows = record["rows"]
    missing = len(open_clip.list_models()) - len(rows)
    states = Counter(row["status"] for row in rows)
    torches = " or ".join(sorted({row["torch"] for row in rows if row["torch"]}))
    yield "# open_clip's registry, pruned to half"
    yield ""
    yield (
        f"{states['ok']} of {len(rows)} names are ok"
        f"{f', and {missing} have not been measured yet' if missing else ''} "
        f"(open_clip {record['open_clip']}, timm {record['timm']}, torch {torches}; random "
        "weights). `python "
        "benchmarks/registry_sweep.py`. The script's docstring lists the checks. Errors are the "
        "largest of pooled and dense outputs, in standard deviations. Blocks: all, or the number "
        "built per stage if the real tower does not fit into memory."
    )
    yield ""
    yield from table(rows)


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The rows as a table in Markdown, and below it why some are not ok."""
    yield "| name | | MACs | slim | largest error | blocks | Torch-Pruning removes | seconds |"
    yield "| --- | --- | ---: | ---: | ---: | --- | ---: | ---: |"
    for row in rows:
        costs = [count(row[key]["macs"]) if row[key] else "" for key in ("dense", "slim")]
        error = "" if row["max_error"] is None else f"{row['max_error']:.1e}"
        stock = "" if row["stock"] is None else f"{row['stock']:.0%}"
        name = f"{row['name']} (as {row['same_as']})" if row["same_as"] else row["name"]
        cells = [name, row["status"], *costs, error, row["blocks"] or "", stock]
        yield f"| {' | '.join(cells)} | {row['seconds']:.0f} |"
    reasons = [row for row in rows if row["reason"]]
    if reasons:
        yield ""
        yield "## Reasons"
        yield ""
        for row in reasons:
            yield f"- {row['name']}: {row['reason']}"


if __name__ == "__main__":
    main()
