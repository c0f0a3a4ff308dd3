"""Prunes image towers of timm's to half by ``timm:NAME``, and proves what was written.

    python benchmarks/timm_sweep.py [--only NAME]

What registry_sweep.py does with open_clip's names, with a small tower of each kind that timm has
and ``timm:NAME`` takes; also kinds that no name of open_clip's stands for. The page is
``timm_sweep.md``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import timm
from registry_sweep import HERE, one, table

from ovsprune.backbones.timm_source import PREFIX
from ovsprune.core.files import write_text

RECORD, PAGE = HERE / "timm_sweep.json", HERE / "timm_sweep.md"

NAMES = (
    "vit_tiny_patch16_224",
    "vit_base_patch16_clip_quickgelu_224.openai",
    "vit_base_patch16_siglip_224",
    "vit_small_patch14_reg4_dinov2",
    "deit3_small_patch16_224",
    "vit_relpos_small_patch16_224",
    "eva02_tiny_patch14_224",
    "vitamin_small_224",
    "swin_tiny_patch4_window7_224",
    "convnext_tiny",
    "convnext_base.clip_laion2b",
    "convnextv2_tiny",
    "efficientnet_lite0",
    "efficientnet_b0",
    "mobilenetv2_100",
    "fastvit_t8",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=NAMES, help="measure this name, and keep the other rows")
    chosen = parser.parse_args(arguments)
    before = json.loads(RECORD.read_text("utf-8"))["rows"] if chosen.only else []
    rows = [row for row in before if row["name"] != chosen.only]
    with tempfile.TemporaryDirectory() as work:
        for name in [chosen.only] if chosen.only else NAMES:
            rows.append({**one(f"{PREFIX}{name}", chosen.threads, Path(work)), "name": name})
            print(json.dumps(rows[-1]), flush=True)
    rows.sort(key=lambda row: NAMES.index(row["name"]))
    write_text(RECORD, json.dumps({"timm": timm.__version__, "rows": rows}, indent=1) + "\n")
    ok = sum(row["status"] == "ok" for row in rows)
    torch = next((row["torch"] for row in rows if row.get("torch")), "?")
    lines = [
        "# Towers of timm, pruned to half",
        "",
        f"{ok} of {len(rows)} names are ok (timm {timm.__version__}, torch {torch}; random "
        "weights). `python benchmarks/timm_sweep.py`. The docstring of `registry_sweep.py` lists "
        "the checks.",
        "",
        *table(rows),
    ]
    write_text(PAGE, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
