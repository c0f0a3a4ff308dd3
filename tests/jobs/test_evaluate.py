"""Scores of a model on scenes and on folders."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ovsprune import backbones
from ovsprune.core.errors import DataError, OptionError, WeightsError
from ovsprune.evaluation.backbone_scores import class_embeddings
from ovsprune.evaluation.datasets import ScenesData
from ovsprune.jobs.evaluate import evaluate

COUNT = 6
SIZE = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write the scenes of `--data scenes` for this model as a folder."""
    place = tmp_path_factory.mktemp("data")
    data = ScenesData(COUNT, size=SIZE)
    for part in ("images", "labels"):
        (place / part).mkdir()
    for sample in data:
        Image.fromarray(sample.image).save(place / "images" / f"{sample.stem}.png")
        label = Image.fromarray(sample.label.astype(np.uint8))
        label.save(place / "labels" / f"{sample.stem}.png")
    classes = {str(i): name for i, name in enumerate(data.class_names)}
    (place / "classes.json").write_text(json.dumps({"void": None, "classes": classes}))
    return place


@pytest.fixture(scope="module")
def scenes(slim):
    return evaluate(str(slim), "scenes", limit=COUNT)


def test_record(scenes):
    assert {"miou", "per_class", "pixel_accuracy", "images", "seconds"} <= set(scenes)
    assert scenes["images"] == COUNT
    assert scenes["pixels"] == COUNT * SIZE * SIZE
    assert scenes["miou"] == pytest.approx(np.mean(list(scenes["per_class"].values())))
    assert 0 < scenes["pixel_accuracy"] < 1


def test_folder_of_the_scenes_has_the_same_scores(slim, folder, scenes):
    record = evaluate(str(slim), folder, batch_size=4)
    assert record["per_class"] == scenes["per_class"]
    assert record["miou"] == scenes["miou"]
    assert record["data"] == str(folder)


def test_embeddings_from_a_file_replace_the_text_tower(slim, folder, scenes, tmp_path):
    names = ScenesData(1, size=SIZE).prompts
    embeddings = class_embeddings(backbones.load_backbone(str(slim)), names).numpy()
    file = tmp_path / "text.npz"
    np.savez(file, names=np.array(names), emb=embeddings)
    assert evaluate(str(slim), folder, text_embeddings=file)["miou"] == scenes["miou"]
    np.savez(file, names=np.array(names), emb=np.roll(embeddings, 1, axis=0))
    assert evaluate(str(slim), folder, text_embeddings=file)["miou"] != scenes["miou"]


def test_list_file_and_limit_select_images(slim, folder, tmp_path):
    listed = tmp_path / "list.txt"
    listed.write_text("test-0-1\ntest-0-3\ntest-0-4\n")
    assert evaluate(str(slim), folder, list_file=listed)["images"] == 3
    assert evaluate(str(slim), folder, list_file=listed, limit=2)["images"] == 2


def test_tower_runs_in_half_precision(slim, scenes, monkeypatch):
    seen = []
    real = backbones.Backbone.dense

    def dense(self, images):
        seen.append((images.dtype, next(self.tower.parameters()).dtype))
        return real(self, images)

    monkeypatch.setattr(backbones.Backbone, "dense", dense)
    record = evaluate(str(slim), "scenes", limit=2, dtype="bfloat16")
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    assert record["images"] == 2


def test_model_without_text_tower_needs_embeddings(slim, folder, monkeypatch):
    load = backbones.load_backbone

    def without_text(name, **options):
        backbone = load(name, **options)
        backbone.encoder = None
        return backbone

    monkeypatch.setattr(backbones, "load_backbone", without_text)
    with pytest.raises(WeightsError, match=r"--text-embeddings FILE\.npz"):
        evaluate(str(slim), folder)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"data": None}, OptionError, "--data is missing: name a folder with images/"),
        ({"limit": 0}, OptionError, "--limit 0 is out of range"),
        ({"batch_size": 0}, OptionError, "--batch-size 0 is out of range"),
        ({"list_file": "x.txt"}, OptionError, r"--list x\.txt needs --data DIR"),
        ({"data": "nowhere"}, DataError, "nowhere has no folder images/"),
        ({"text_embeddings": "no.npz"}, DataError, r"no\.npz cannot be read as text embeddings"),
        ({"dtype": "int8"}, OptionError, "--dtype 'int8' is unknown"),
    ],
)
def test_user_errors_are_reported(slim, options, error, message):
    with pytest.raises(error, match=message):
        evaluate(str(slim), **{"data": "scenes", **options})
