"""The paper's tables, in small: every mask, every training, and the page, resumable run by run.

    python benchmarks/paper_tables/run.py --data DATA
    python benchmarks/paper_tables/run.py --list

The ResNet is trained first, by ``backbone.py``, if ``resnet/`` is not there. Rows are kept in
``--work`` as they are done, and a training goes on from its checkpoint; two processes with the same
``--work`` share the queue, and one trains the ResNet, or finds its masks, while the other does what
stands on the ViT. What ``results.json`` has already, made on another machine, is not made again
(unless by ``--fresh``). ``--page`` renders what there is and runs nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import masks as found_masks
import page
from frameworks import FRAMEWORKS
from masks import folder_of
from places import CARD, PAGE, RESULTS, SPECTRA
from plan import HOURS, LIMIT, SCHEDULED, SPARSITIES, STEPS, TRAINED_AT, Run, runs
from towers import tower_file, towers
from training import Settings, check_recipe, claimed, do, photographs, vocabulary, write_row


def restore(work: Path, results: Path = RESULTS) -> None:
    """Put the rows of the record into ``work``, where it has none of its own."""
    if not results.is_file():
        return
    record = json.loads(results.read_text())
    files: dict[Path, Any] = {
        work / "rows" / f"{Run(**{k: row[k] for k in _KEYS}).name}.json": row
        for row in record["rows"]
    }
    for row in record["towers"]:
        place = tower_file(work, row["backbone"], row["sparsity"])
        files.setdefault(place, []).append(row)
    files |= {work / "known" / f"{name}.json": found for name, found in record["masks"].items()}
    for kind in ("costs", "steps"):
        for row in record.get(kind, []):
            files[work / kind / f"{row['framework']}-{TRAINED_AT:g}.json"] = row
    for file, content in files.items():
        if not file.exists():
            write_row(file, content)


def collect(work: Path) -> dict[str, Any]:
    """The record of all that is in ``work``.

    Raises:
        SystemExit: The masks that were found here are not those of the rows from the record.
    """

    def read(folder: str) -> list[Any]:
        return [json.loads(p.read_text()) for p in sorted((work / folder).glob("*.json"))]

    order = {run.name: i for i, run in enumerate(runs())}
    rows = [r for r in read("rows") if Run(**{k: r[k] for k in _KEYS}).name in order]
    for row in rows:
        check_recipe(row, Settings())
    rows.sort(key=lambda r: order[Run(**{k: r[k] for k in _KEYS}).name])
    known = {p.stem: json.loads(p.read_text()) for p in sorted((work / "known").glob("*.json"))}
    here = {p.parent.name: p for p in sorted((work / "masks").glob("*/masks.json"))}
    found = {name: json.loads(p.read_text()) for name, p in here.items()}
    for name, what in itertools.product(known.keys() & found.keys(), ("tower", "zeros")):
        mine, theirs = found[name].get(what), known[name].get(what)
        if mine != theirs:
            raise SystemExit(
                f"the masks of {name} have {what} {mine} here and {theirs} in the record: their "
                "rows cannot stand in one table; start anew with --fresh and another --work"
            )
    return {
        "plan": {"trainings": len(runs()), "limit": LIMIT, "hours": HOURS, "steps": STEPS},
        "backbone": json.loads(CARD.read_text()) if CARD.exists() else None,
        "masks": known | found,
        "towers": [row for rows in read("towers") for row in rows],
        "costs": read("costs"),
        "steps": read("steps"),
        "rows": rows,
    }


_KEYS = ("framework", "mask", "policy", "seed")


def draw_spectra(work: Path) -> None:
    """A picture of the spectra that the policies go by, beside the page."""
    place = folder_of(work, FRAMEWORKS[SCHEDULED].backbone, TRAINED_AT) / "structured"
    weights = place / "model.safetensors"
    if not weights.is_file():
        return
    if SPECTRA.exists() and SPECTRA.stat().st_mtime > weights.stat().st_mtime:
        return
    from ovsprune import backbones
    from ovsprune.report.spectra import draw
    from ovsprune.spectrum import matrices, spectra

    tower = backbones.load_backbone(str(place)).tower
    draw(spectra(matrices(tower)), SPECTRA, title="the structured ResNet's spectra, fit peak")


def write(work: Path, results: Path = RESULTS, page_file: Path = PAGE) -> None:
    """``results.json`` and the page."""
    draw_spectra(work)
    record = collect(work)
    write_row(results, record)
    page_file.write_text(page.render(record))
    print(f"{page_file}: {len(record['rows'])} of {len(runs())} trainings")


def work_through(chosen: argparse.Namespace) -> None:
    """All that is not done yet; what needs a ResNet that is not there is left out."""
    from timing import all_costs, steps

    failed: list[str] = []
    for wait in (False, True):  # for another process: only when nothing else is left to do
        _train_resnet(chosen, failed, wait=wait)
        _do_all(chosen, failed, wait=wait)
    with claimed(chosen.work / "locks" / "costs.lock") as mine:
        if mine:
            all_costs(vocabulary(photographs(chosen.data)), chosen.work)
            steps(chosen.data, chosen.work)
    for sparsity, name in itertools.product(SPARSITIES, found_masks.FOLDERS):
        with claimed(chosen.work / "locks" / f"towers-{name}-{sparsity:g}.lock") as mine:
            there = tower_file(chosen.work, name, sparsity).exists()
            if mine and _ready(name) and not there and _find(name, sparsity, chosen, wait=True):
                towers(name, sparsity, chosen.data, chosen.work)
    write(chosen.work)
    if failed:
        raise SystemExit(f"failed, and left out: {', '.join(failed)}")


def _do_all(chosen: argparse.Namespace, failed: list[str], *, wait: bool) -> None:
    """The trainings that are not done and whose tower is there; names those that fail."""
    for run in runs(chosen.only):
        backbone = FRAMEWORKS[run.framework].backbone
        if run.name in failed or not _ready(backbone):
            continue
        try:
            there = _find(backbone, TRAINED_AT, chosen, wait=wait)
            if there and do(run, chosen.data, chosen.work, Settings()):
                write(chosen.work)
        except Exception:  # one framework's failure is no reason to leave the others undone
            traceback.print_exc()
            failed.append(run.name)


def _train_resnet(chosen: argparse.Namespace, failed: list[str], *, wait: bool) -> None:
    """Train the ResNet, if it is not there and no other process is at it, or wait for that one."""
    import backbone

    with claimed(chosen.work / "locks" / "resnet.lock", wait=wait) as mine:
        if not mine or CARD.is_file() or "resnet" in failed:
            return
        try:
            final = backbone.train(chosen.data, chosen.work / "resnet", backbone.Settings())
            if not _ready("resnet"):
                backbone.export(final)
            backbone.measure(final, chosen.data)
        except Exception:
            traceback.print_exc()
            failed.append("resnet")


def _ready(backbone: str) -> bool:
    """Whether the tower is there."""
    return (found_masks.FOLDERS[backbone] / "open_clip_model.safetensors").is_file()


def _find(backbone: str, sparsity: float, chosen: argparse.Namespace, *, wait: bool) -> bool:
    """Whether the masks are there; those that another process looks for are, after a ``wait``."""
    lock = chosen.work / "locks" / f"masks-{backbone}-{sparsity:g}.lock"
    with claimed(lock, wait=wait) as mine:
        if mine:
            found_masks.find(backbone, sparsity, chosen.data, chosen.work)
        return mine


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, help="the folder of photographs")
    parser.add_argument("--work", type=Path, default=Path("runs") / "paper-tables")
    parser.add_argument("--only", choices=("table1", "table2"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fresh", action="store_true", help="leave the record's rows out")
    parser.add_argument("--list", action="store_true", help="list the trainings and stop")
    parser.add_argument("--page", action="store_true", help="render what there is and stop")
    chosen = parser.parse_args(arguments)
    if not chosen.fresh:
        restore(chosen.work)
    if chosen.list:
        for run in runs(chosen.only):
            done = (chosen.work / "rows" / f"{run.name}.json").exists()
            print(f"{'done' if done else '    '} {run.name} ({', '.join(run.tables)})")
        return
    if chosen.page:
        write(chosen.work)
        return
    if chosen.data is None:
        parser.error("give --data DATA, the folder of photographs")
    import torch

    torch.set_num_threads(chosen.threads)
    work_through(chosen)


if __name__ == "__main__":
    main()
