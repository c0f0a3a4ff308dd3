"""Prunes image towers of transformers' classes to half, and proves what was written.

    python benchmarks/transformers_sweep.py

What registry_sweep.py does with open_clip's names, with a small configuration of each class that
``hf:NAME`` takes (a hub is not needed). The page is ``transformers_sweep.md``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from registry_sweep import HERE, one, table

from ovsprune.backbones.transformers_source import PREFIX
from ovsprune.core.files import write_text

RECORD, PAGE = HERE / "transformers_sweep.json", HERE / "transformers_sweep.md"

_BLOCKS = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "patch_size": 16,
}
_VISION = {**_BLOCKS, "intermediate_size": 768, "image_size": 224}
_TEXT = {"hidden_size": 192, "num_hidden_layers": 1, "num_attention_heads": 6}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "CLIPModel": {"vision_config": _VISION, "text_config": _TEXT, "projection_dim": 128},
    "CLIPVisionModel": _VISION,
    "CLIPVisionModelWithProjection": {**_VISION, "projection_dim": 128},
    "SiglipModel": {"vision_config": _VISION, "text_config": _TEXT},
    "SiglipVisionModel": _VISION,
    "Siglip2Model": {
        "vision_config": {**_BLOCKS, "intermediate_size": 768, "num_patches": 196},
        "text_config": _TEXT,
    },
    "Siglip2VisionModel": {**_BLOCKS, "intermediate_size": 768, "num_patches": 196},
    "Dinov2Model": {**_BLOCKS, "image_size": 224},
}
"""A small configuration of every class."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for name, numbers in CONFIGS.items():
            folder = Path(work, name)
            config = getattr(transformers, name).config_class(**numbers, architectures=[name])
            config.save_pretrained(folder)
            row = one(f"{PREFIX}{folder}", chosen.threads, Path(work))
            rows.append(row | {"name": name, "reason": _plain(row["reason"], work)})
            print(json.dumps(rows[-1]), flush=True)
    record = {"transformers": transformers.__version__, "rows": rows}
    write_text(RECORD, json.dumps(record, indent=1) + "\n")
    ok = sum(row["status"] == "ok" for row in rows)
    lines = [
        "# Towers of transformers, pruned to half",
        "",
        f"{ok} of {len(rows)} classes are ok (transformers {transformers.__version__}, torch "
        f"{rows[0]['torch']}; small configurations, random weights). `python "
        "benchmarks/transformers_sweep.py`. The docstring of `registry_sweep.py` lists the checks.",
        "",
        *table(rows),
    ]
    write_text(PAGE, "\n".join(lines) + "\n")


def _plain(reason: str | None, work: str) -> str | None:
    """A reason without the scratch folder's path."""
    return None if reason is None else reason.replace(f"{work}/", "")


if __name__ == "__main__":
    main()
