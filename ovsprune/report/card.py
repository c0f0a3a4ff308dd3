"""Model card of a slim checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovsprune.report.numbers import budget_name, change, count, duration, percent

if TYPE_CHECKING:
    from ovsprune.slim.spec import LayerSpec, SlimSpec

__all__ = ["card", "is_protected"]

FRONT_MATTER = """\
---
library_name: ovsprune
pipeline_tag: image-feature-extraction
tags:
- ovsprune
- pruning
- clip
- open-vocabulary-segmentation
---"""

LIMITS = """\
## Limitations

- The licence and the terms of use of the base model apply to this checkpoint, too.
- Biases of the base model remain. Pruning can increase the error on content that is rare in the
  calibration images.
- Nothing in this directory is pickled or names code to import."""


def is_protected(spec: SlimSpec, layer: LayerSpec) -> bool:
    """Return True if a pattern of the spec protects ``layer`` or its block."""
    return any(fnmatchcase(name, p) for p in spec.protected for name in (layer.name, layer.block))


def card(spec: SlimSpec, record: Mapping[str, Any]) -> str:
    """Return the text of a slim checkpoint's ``README.md``.

    Args:
        spec: Spec of the checkpoint; ``files`` may still be empty.
        record: Record of the prune (the keys of ``ovsprune prune --json``), each key optional.

    Returns:
        Markdown with the YAML front matter of model hubs.
    """
    parts = [
        FRONT_MATTER,
        _summary(spec, record),
        _costs(spec),
        _quality(record),
        _usage(spec),
        _layers(spec),
        _provenance(spec, record),
        LIMITS,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(spec: SlimSpec, record: Mapping[str, Any]) -> str:
    removed = f"{percent(spec.ratio)} of its MACs removed"
    asked = record.get("ratio")
    if asked is not None:
        budget = budget_name(str(record.get("budget", "macs")))
        given = record.get("given")
        of = f" of {Path(given['slim']).name}, which was pruned before" if given else ""
        removed += f" (requested: {percent(float(asked))} of the {budget}{of})"
    base = spec.base
    weights = f"weights `{base.pretrained}`" if base.pretrained else "no pretrained weights"
    training = "and without gradient steps"
    # distill_lr is recorded only after distillation; imp may run with 0 steps.
    if "distill_lr" in spec.provenance or spec.provenance.get("imp_steps"):
        training = "(the remaining weights were trained to reproduce the dense tower's features)"
    text = (
        f"# {base.model}, slim\n\n"
        f"The image tower of `{base.model}` ({weights}) with {removed}. "
        "Whole attention heads and MLP units were removed without labels "
        f"{training}, so the tower is smaller and faster on any hardware."
    )
    if not base.trained:
        text += (
            "\n\n> **Untrained.** The base model's weights are random initial values. This "
            "checkpoint shows shapes and speed; its predictions are meaningless."
        )
    return text


def _costs(spec: SlimSpec) -> str:
    size = " x ".join(str(side) for side in spec.preprocess.size)
    rows = [f"| one image of {size} | dense | slim | change |", "| --- | ---: | ---: | ---: |"]
    for name, dense, slim in (
        ("MACs", spec.dense.macs, spec.slim.macs),
        ("parameters", spec.dense.params, spec.slim.params),
    ):
        rows.append(f"| {name} | {count(dense)} | {count(slim)} | {change(dense, slim)} |")
    return "## Costs of the image tower\n\n" + "\n".join(rows)


def _quality(record: Mapping[str, Any]) -> str:
    fidelity = record.get("fidelity")
    if not fidelity:
        return ""
    reference = "the slim tower before" if record.get("given") else "the dense tower"
    return (
        f"## Agreement with {reference}\n\n"
        f"Measured on held-out calibration images, against {reference}:\n\n"
        f"- cosine similarity of the dense features: {fidelity['cosine']:.4f}\n"
        f"- relative error of the dense features: {fidelity['relative_error']:.4f}\n\n"
        "These figures measure features, not segmentation quality. "
        "`ovsprune evaluate --model <this directory> --data <your data>` measures the latter."
    )


def _usage(spec: SlimSpec) -> str:
    blocks = [
        "## Use",
        "```python\n"
        "import ovsprune\n\n"
        'tower = ovsprune.load("path/to/this/directory")\n'
        "features = tower.dense(images)  # [B, C, h, w], from images [B, 3, H, W]\n"
        "```",
    ]
    if spec.library.startswith("open_clip"):
        blocks.append(
            "The full model, as `open_clip` returns it:\n\n"
            "```python\n"
            'model, _, preprocess = ovsprune.load_open_clip("path/to/this/directory")\n'
            "```"
        )
    blocks.append(
        "In a segmentation framework: `ovsprune transfer --target NAME --slim <this directory>`"
        " (`ovsprune targets` lists the names). The activation function is "
        f"`{spec.activation}`; towers with another one are refused."
    )
    return "\n\n".join(blocks)


def _layers(spec: SlimSpec) -> str:
    rows = ["| layer | units | kept | of |", "| --- | --- | ---: | ---: |"]
    for layer in spec.layers:
        mark = " (protected)" if is_protected(spec, layer) else ""
        rows.append(f"| `{layer.name}`{mark} | {layer.kind} | {layer.kept} | {layer.units} |")
    if len(rows) == 2:  # heading only
        return ""
    table = "\n".join(rows)
    listed = {layer.name for layer in spec.layers}
    unpruned = [f"`{name}`" for name in spec.protected if name not in listed]
    if unpruned:
        table += f"\n\nNot pruned: {', '.join(unpruned)}."
    return (
        f"## Layers\n\n{table}\n\n`mask.safetensors` holds the indices of "
        "the kept units in the base model; they apply to any weights of that architecture."
    )


def _provenance(spec: SlimSpec, record: Mapping[str, Any]) -> str:
    built = f"{spec.family}, {spec.library} {spec.library_version}".strip()
    facts = {"built by": built, **spec.provenance}
    rows = [
        f"- {key.replace('_', ' ')}: {_value(value)}"
        for key, value in facts.items()
        if value not in (None, "")
    ]
    if isinstance(record.get("seconds"), int | float):
        rows.append(f"- time to prune: {duration(float(record['seconds']))}")
    return "## Provenance\n\n" + "\n".join(rows)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value(inner)}" for key, inner in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(_value(inner) for inner in value)
    return f"`{value}`" if isinstance(value, str) else str(value)
