from __future__ import annotations

from ovsprune.jobs.listing import criteria, models, targets


def test_models_have_the_names_that_people_need_and_their_weights():
    listed = {entry["name"]: entry for entry in models()["models"]}
    assert "openai" in listed["ViT-B-16"]["weights"]
    assert "openai" in listed["ViT-B-16"]["summary"]
    assert listed["tiny"]["summary"].startswith("ships with ovsprune")
    assert all(entry["summary"] for entry in listed.values())


def test_every_part_of_a_pruning_says_what_it_is():
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


def test_targets_say_what_they_are():
    listed = {entry["name"]: entry["summary"] for entry in targets()["targets"]}
    assert {"mmseg-san", "san"} <= set(listed)
    assert all(listed.values())
