"""Transfer into a small SAN of mmsegmentation."""

from __future__ import annotations

import sys
from copy import deepcopy

import pytest

from ovsprune.backbones.open_clip_build import assemble
from ovsprune.backbones.open_clip_model import build_clip
from ovsprune.backbones.open_clip_source import other_tensors
from ovsprune.core.records import DenseModel
from ovsprune.evaluation.backbone_scores import class_embeddings
from ovsprune.evaluation.datasets import ScenesData
from ovsprune.jobs.prune import prune
from ovsprune.jobs.small_san import transfer_into_small_san


@pytest.fixture(scope="module")
def scenes():
    return ScenesData(2, size=48)


def run(small_clip, slim, scenes):
    embeddings = class_embeddings(small_clip, scenes.prompts)
    return transfer_into_small_san(small_clip, slim, embeddings, scenes.class_names, list(scenes))


@pytest.mark.framework
def test_slim_tower_in_a_small_san(small_clip, scenes, tmp_path):
    pytest.importorskip("mmseg")
    # What random weights gave would be refused without force; the demo's are trained.
    config = deepcopy(small_clip.architecture)
    config["vision_cfg"]["layers"] = 6  # SAN reads three places of the front blocks
    model = build_clip(config)
    text = other_tensors(model)
    dense = DenseModel("small", config, small_clip.preprocess, trained=True, text=text)
    trained = assemble("open_clip-vit", dense, model)
    found = []
    for name, ratio in (("little", 0.2), ("much", 0.6)):
        output = tmp_path / name
        # No refit: on random weights it turns on rounding, and says nothing of what was cut.
        prune(trained, ratio, output=output, samples=8, criterion="magnitude",
              allocation="uniform", recovery="none")  # fmt: skip
        found.append(run(trained, output, scenes))
    little, much = found
    assert little["detached"] and much["detached"]
    assert little["modules"] > 0
    before = little["params"]["before"]
    assert much["params"]["after"] < little["params"]["after"] < before
    assert much["params"]["before"] == before
    assert little["cosine"]["masks"] > 0.9
    assert little["cosine"]["masks"] > much["cosine"]["masks"]
    assert little["cosine"]["logits"] > much["cosine"]["logits"]


def test_step_is_skipped_without_mmsegmentation(small_clip, slim, scenes, monkeypatch):
    for name in ("mmseg", "mmengine", "mmcv"):
        monkeypatch.setitem(sys.modules, name, None)
    found = run(small_clip, slim, scenes)
    assert set(found) == {"skipped"}
    assert "mmseg" in found["skipped"]
    assert "is not installed" in found["skipped"]
