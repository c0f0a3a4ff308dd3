from __future__ import annotations

from dataclasses import replace

import pytest

from ovsprune.core.records import Costs, Preprocess
from ovsprune.report.card import card, is_protected
from ovsprune.slim.spec import BaseSpec, LayerSpec, SlimSpec


@pytest.fixture
def spec() -> SlimSpec:
    layers = tuple(
        LayerSpec(f"blocks.{i}.attn", "heads", f"blocks.{i}", units=4, kept=2 + i, unit_width=16)
        for i in range(3)
    )
    return SlimSpec(
        base=BaseSpec("ViT-B-16", "openai", True, {}),
        family="clip-vit",
        library="open_clip_torch",
        library_version="3.3.0",
        architecture={},
        activation="quick_gelu",
        preprocess=Preprocess((224, 224)),
        layers=layers,
        protected=("*.2.attn",),
        dense=Costs(17_563_000_000, 86_192_640),
        slim=Costs(8_781_500_000, 43_096_320),
        provenance={"criterion": "reconstruction", "seed": 3, "command": None},
    )


def test_card_states_costs_fidelity_layers_and_provenance(spec):
    record = {
        "ratio": 0.5,
        "budget": "params",
        "fidelity": {"cosine": 0.98765, "relative_error": 0.1234},
        "seconds": 61.0,
    }
    text = card(spec, record)
    assert text.startswith("---\nlibrary_name: ovsprune\n")
    assert "50.0% of its MACs removed (requested: 50.0% of the parameters)" in text
    assert "| MACs | 17.6 G | 8.78 G | -50.0% |" in text
    assert "cosine similarity of the dense features: 0.9877" in text
    assert "relative error of the dense features: 0.1234" in text
    assert "| `blocks.1.attn` | heads | 3 | 4 |" in text
    assert "| `blocks.2.attn` (protected) | heads | 4 | 4 |" in text
    assert "- criterion: `reconstruction`" in text
    assert "- seed: 3" in text
    assert "- time to prune: 1 min 01 s" in text
    assert "`quick_gelu`" in text
    assert "load_open_clip" in text
    assert "None" not in text


def test_card_of_a_bare_record_has_no_empty_sections(spec):
    text = card(replace(spec, layers=(), library="timm"), {})
    assert "Agreement with" not in text
    assert "## Layers" not in text
    assert "load_open_clip" not in text
    assert "requested" not in text


def test_card_of_an_untrained_base_has_a_warning(spec):
    untrained = replace(spec, base=BaseSpec("ViT-B-16", None, False, {}))
    assert "**Untrained.**" in card(untrained, {})
    assert "**Untrained.**" not in card(spec, {})


def test_protection_matches_the_layer_or_its_block(spec):
    assert [is_protected(spec, layer) for layer in spec.layers] == [False, False, True]
    by_block = replace(spec, protected=("blocks.0",))
    assert "Not pruned: `blocks.0`" in card(by_block, {})
    assert [is_protected(by_block, layer) for layer in spec.layers] == [True, False, False]
