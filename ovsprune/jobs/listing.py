"""Lists of models, targets, criteria, allocations and recoveries."""

from __future__ import annotations

from typing import Any

from ovsprune.core.registry import Registry

__all__ = ["Listing", "criteria", "entries", "models", "targets"]

Listing = dict[str, list[dict[str, Any]]]

EMBEDDED = "ships with ovsprune: trained on procedural scenes"


def models() -> Listing:
    """List the model names for ``--model``: ``models[{name, summary, weights}]``.

    ``weights`` are the tags that ``--pretrained`` accepts for the name.
    """
    # Not above: schedule() imports this module where open_clip may be missing.
    import open_clip

    from ovsprune.backbones import model_names

    listed = []
    for name in model_names():
        tags = open_clip.list_pretrained_tags_by_model(name)
        summary = ", ".join(tags) or (EMBEDDED if name == "tiny" else "no weights are published")
        listed.append({"name": name, "summary": summary, "weights": tags})
    return {"models": listed}


def targets() -> Listing:
    """List the frameworks for ``--target``: ``targets[{name, summary}]``."""
    from ovsprune.targets import TARGETS

    return {"targets": entries(TARGETS)}


def criteria() -> Listing:
    """List ``criteria``, ``allocations`` and ``recoveries``, each as ``[{name, summary}]``."""
    from ovsprune.allocation import ALLOCATIONS
    from ovsprune.importance import CRITERIA
    from ovsprune.recovery import RECOVERIES

    return {
        "criteria": entries(CRITERIA),
        "allocations": entries(ALLOCATIONS),
        "recoveries": entries(RECOVERIES),
    }


def entries(registry: Registry[Any]) -> list[dict[str, str]]:
    """List the names and summaries of a registry: ``[{name, summary}]``."""
    return [{"name": name, "summary": registry.summary(name)} for name in registry.names()]
