from __future__ import annotations

from ovsprune.jobs.listing import criteria, models, targets


def test_models_list_names_and_weights():
    listed = {entry["name"]: entry for entry in models()["models"]}
    assert "openai" in listed["ViT-B-16"]["weights"]
    assert "openai" in listed["ViT-B-16"]["summary"]
    assert listed["tiny"]["summary"].startswith("ships with ovsprune")
    assert all(entry["summary"] for entry in listed.values())


def test_criteria_allocations_and_recoveries_have_summaries():
    listed = criteria()
    names = {kind: {entry["name"] for entry in entries} for kind, entries in listed.items()}
    assert names["criteria"] >= {
        "activation",
        "bn-scale",
        "fisher",
        "fpgm",
        "lamp",
        "magnitude",
        "magnitude-l1",
        "random",
        "reconstruction",
        "spectral",
        "taylor",
    }
    assert {"sensitivity", "uniform"} <= names["allocations"]
    assert {"closed-form", "none"} <= names["recoveries"]
    assert all(entry["summary"] for entries in listed.values() for entry in entries)


def test_targets_have_summaries():
    listed = {entry["name"]: entry["summary"] for entry in targets()["targets"]}
    assert {"mmseg-san", "san"} <= set(listed)
    assert all(listed.values())
