"""Terminal summary and model card of an unstructured result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.text import Text

from ovsprune.report.numbers import count, duration, percent
from ovsprune.report.tables import saved_line, table

if TYPE_CHECKING:
    from ovsprune.masks.spec import MaskedSpec

__all__ = ["unstructured_card", "unstructured_summary"]


def unstructured_summary(record: Mapping[str, Any]) -> Sequence[RenderableType]:
    """Summarise ``prune --method imp``: costs, fidelity and output."""
    dense, nonzero = record["dense"], record["nonzero"]
    rows = [
        # Zeros are stored and computed like other values: masked costs as much as dense.
        ["parameters", count(dense["params"]), count(dense["params"]), count(nonzero["params"])],
        ["MACs", count(dense["macs"]), count(dense["macs"]), count(nonzero["macs"])],
    ]
    costs = table(
        f"{record['model']}: image tower", ["", "dense", "masked", "masked, non-zero"], rows
    )
    fidelity = record["fidelity"]
    lines = [
        record["note"],
        "",
        "Dense features on held-out images, masked against dense: cosine "
        f"{fidelity['cosine']:.4f}, relative error {fidelity['relative_error']:.4f}.",
        f"{percent(record['achieved'], 2)} of the ranked weights are zero, after "
        f"{len(record['rounds'])} rounds of {record['imp_steps']} steps, in "
        f"{duration(record['seconds'])}.",
    ]
    lines.append(saved_line(record))
    return [costs, Text("\n".join(lines))]


def unstructured_card(spec: MaskedSpec, record: Mapping[str, Any]) -> str:
    """Return the text of an unstructured result's ``README.md`` from spec and record."""
    fidelity = record["fidelity"]
    untrained = (
        "\n> **Untrained.** The base model's weights were random: this result shows shapes, and "
        "its predictions are meaningless.\n"
    )
    facts = [f"- {key.replace('_', ' ')}: `{value}`" for key, value in spec.provenance.items()]
    provenance = "\n".join(facts)
    rows = "\n".join(
        f"| `{w.name}` | {w.count} | {w.zeros} | {percent(w.sparsity)} |" for w in spec.weights
    )
    kept = ", ".join(f"`{name}`" for name in spec.excluded)
    params, macs = count(spec.dense.params), count(spec.dense.macs)
    return f"""\
# {spec.base.model}, masked

The image tower of `{spec.base.model}` (weights `{spec.base.pretrained}`), in which
{percent(spec.sparsity)} of the ranked weights are zero, found by iterative magnitude pruning with
feature distillation.

**{record["note"]}**
{"" if spec.base.trained else untrained}
| | dense | masked | masked, non-zero |
| --- | ---: | ---: | ---: |
| parameters | {params} | {params} | {count(spec.nonzero.params)} |
| MACs | {macs} | {macs} | {count(spec.nonzero.macs)} |

Dense features on held-out calibration images, masked against dense: cosine
{fidelity["cosine"]:.4f}, relative error {fidelity["relative_error"]:.4f}.

## Use

`model.safetensors` has the names and shapes of the base model and is loaded in the same way.
`masks.safetensors` applies to any weights of the architecture:

```python
from ovsprune.masks import apply_masks, read_masks

apply_masks(model, read_masks("path/to/this/directory"))
```

## Weights

| weight | entries | zero | share |
| --- | ---: | ---: | ---: |
{rows}

Not ranked: {kept}.

## Provenance

{provenance}

The licence and the terms of use of the base model apply to this directory, too.
"""
