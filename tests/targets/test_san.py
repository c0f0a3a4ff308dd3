"""Layout of MendelXu/SAN: live models with its names, and all keys of checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ovsprune.core.errors import CheckpointError, OptionError, TargetError
from ovsprune.slim import SlimAttention, SlimCheckpoint
from ovsprune.slim.cutting import cut_state
from ovsprune.targets import TARGETS, load_into
from ovsprune.targets.output import check_transfer_output, write_output
from tests.targets.by_hand import MiniSan, error, masked, slim_by_hand, small_slim, small_tower

SAN = TARGETS.get("san")
POSITIONS = "clip_visual_extractor.positional_embedding"


def test_names_go_both_ways() -> None:
    layout = SAN.layout(None, 12)
    assert layout.starts == (0, 9)
    pairs = {
        "transformer.resblocks.8.attn.in_proj_bias": (
            "clip_visual_extractor.resblocks.8.attn.in_proj_bias"
        ),
        "transformer.resblocks.9.ln_1.weight": "clip_rec_head.resblocks.0.ln_1.weight",
        "transformer.resblocks.11.mlp.c_fc.weight": "clip_rec_head.resblocks.2.mlp.c_fc.weight",
        "conv1.weight": "clip_visual_extractor.conv1.weight",
        "class_embedding": "clip_visual_extractor.class_embedding",
        "ln_post.bias": "clip_rec_head.ln_post.bias",
        "proj": "clip_rec_head.proj",
    }
    for canonical, name in pairs.items():
        assert layout.name(canonical) == name
        assert layout.canonical(name) == canonical
    assert layout.name("transformer.resblocks.12.ln_1.weight") is None
    assert layout.canonical("side_adapter_network.weight") is None
    assert layout.text is not None
    assert layout.text.name("transformer.resblocks.3.ln_1.bias") == (
        "ov_classifier.transformer.resblocks.3.ln_1.bias"
    )
    assert layout.text.name("text_projection") == "ov_classifier.text_projection"


def test_live_slim_equals_masked_with_a_bias_per_head() -> None:
    tower = small_tower()
    kept = {name: chosen.tolist() for name, chosen in small_slim(tower).mask.items()}
    kept["transformer.resblocks.3.attn"] = [0, 2, 3]
    model, slim = MiniSan.with_tower(tower), slim_by_hand(tower, kept, heads=4, size=32)
    torch.manual_seed(0)
    images, bias = torch.randn(2, 3, 32, 32), torch.randn(8, 17, 17) * 2
    with masked(model, slim, SAN.layout(model.state_dict(), 4)):
        wanted = {"out": model.run(images, bias)}
    with SAN.attach(model, slim) as attached:
        assert attached.weights == "slim"
        assert isinstance(model.clip_rec_head.resblocks[0].attn, SlimAttention)  # type: ignore[index, union-attr]
        assert model.clip_rec_head.resblocks[0].attn.num_heads == 4  # type: ignore[index, union-attr]
        found = error({"out": model.run(images, bias)}, wanted)
        rolled = bias.unflatten(0, (2, 4)).roll(1, dims=1).flatten(0, 1)
        wrong = error({"out": model.run(images, rolled)}, wanted)
    assert found["out"] < 1e-4 < 1e-2 < wrong["out"]


def test_attached_reports_and_detaches() -> None:
    tower = small_tower()
    model, slim = MiniSan.with_tower(tower), small_slim(tower)
    before = {k: (id(v), v.detach().clone()) for k, v in model.state_dict(keep_vars=True).items()}
    attached = SAN.attach(model, slim)
    record = attached.record()
    assert record["params_after"] == sum(p.numel() for p in model.parameters())
    assert record["params_after"] < record["params_before"]
    assert record["kept"][POSITIONS] == "the framework resizes and trains its positions"
    assert "positional_embedding" in record["protected"]
    assert SAN.towers(model) == {
        "blocks 0-2": "clip_visual_extractor.resblocks",
        "blocks 3-3": "clip_rec_head.resblocks",
    }
    attached.detach()
    after = model.state_dict(keep_vars=True)
    assert {k: id(v) for k, v in after.items()} == {k: i for k, (i, _) in before.items()}
    assert all(torch.equal(after[k].detach(), v) for k, (_, v) in before.items())


def test_frozen_stays_frozen_and_trained_stays_trained() -> None:
    model, slim = MiniSan.with_tower(small_tower()), small_slim()
    name = "clip_visual_extractor.resblocks.0.mlp.c_fc.weight"
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(path == name)
    with SAN.attach(model, slim):
        learning = {path for path, parameter in model.named_parameters() if parameter.requires_grad}
    assert learning == {name}


def test_finetuned_tower_keeps_its_own_weights_cut_by_the_mask() -> None:
    tuned = {k: v * 1.05 for k, v in small_tower().items()}
    model, slim = MiniSan.with_tower(tuned), small_slim()
    layout = SAN.layout(model.state_dict(), 4)
    wanted = cut_state(tuned, slim.spec, slim.mask)
    with SAN.attach(model, slim) as attached:
        assert attached.weights == "target" and "finetuned CLIP" in attached.reason
        state = model.state_dict()
        for canonical, tensor in wanted.items():
            if canonical != "positional_embedding":
                assert torch.equal(state[str(layout.name(canonical))], tensor), canonical


def converted(model: nn.Module, slim: SlimCheckpoint, weights: str = "auto", **options: Any) -> Any:
    return SAN.convert(model.state_dict(), slim, weights=weights, **options)


def test_every_key_is_reported_once() -> None:
    model, slim = MiniSan.with_tower(small_tower()), small_slim()
    result = converted(model, slim)
    keys = set(model.state_dict())
    assert result.weights == "slim" and result.complete
    assert set(result.replaced) | set(result.kept) == keys == set(result.state)
    assert not set(result.replaced) & set(result.kept)
    in_dropped = {name.removeprefix("slim: ") for name in result.dropped}
    assert in_dropped == {"visual.positional_embedding", *slim.text()}
    assert result.kept[POSITIONS] == "the framework resizes and trains its positions"
    assert result.kept["side_adapter_network.weight"] == "no part of the image tower"
    assert result.kept["ov_classifier.logit_scale"] == "the text tower was not pruned"
    heads = len(slim.mask["transformer.resblocks.0.attn"])
    assert result.replaced["clip_visual_extractor.resblocks.0.attn.in_proj_weight"] == (
        f"the slim tower, {heads} of 4 heads"
    )


@pytest.mark.parametrize("weights", ["slim", "target"])
def test_round_trip_through_a_fresh_framework(tmp_path: Path, weights: str) -> None:
    """Compares a transferred checkpoint of the framework with the attached model."""
    tower = small_tower()
    model, slim = MiniSan.with_tower(tower), small_slim(tower)
    result = converted(model, slim, weights)
    write_output(tmp_path / "out", result, {"target": "san"}, "# lines")
    fresh = MiniSan.with_tower(small_tower(seed=9))
    assert load_into(fresh, tmp_path / "out") == []
    with SAN.attach(model, slim, weights=weights):
        wanted = model.state_dict()
        assert list(wanted) == list(fresh.state_dict())
        assert all(torch.equal(fresh.state_dict()[k], v) for k, v in wanted.items())
        assert wanted.keys() == result.state.keys()  # nothing missing, nothing unexpected
        model.load_state_dict(dict(result.state), strict=True)
    with pytest.raises(TargetError, match="not of the slim model"):
        fresh.load_state_dict(MiniSan.with_tower(tower).state_dict(), strict=False)
    assert not [n for n in fresh.state_dict() if "kept" in n]


def test_clip_alone_without_a_framework_checkpoint(tmp_path: Path) -> None:
    tower = small_tower()
    slim = small_slim(tower)
    result = SAN.convert(None, slim)
    assert not result.complete
    text = {"ov_classifier.token_embedding.weight", "ov_classifier.logit_scale"}
    assert text < set(result.state)
    write_output(tmp_path / "out", replace(result, state={
        k: v for k, v in result.state.items() if not k.startswith("ov_classifier.t")
    }), {"target": "san"}, "")  # fmt: skip
    fresh = MiniSan.with_tower(small_tower(seed=9))
    adapter = fresh.side_adapter_network.weight.clone()
    missing = load_into(fresh, tmp_path / "out")
    assert "side_adapter_network.weight" in missing and POSITIONS not in missing
    assert torch.equal(fresh.side_adapter_network.weight, adapter)
    assert torch.equal(
        fresh.get_parameter("clip_visual_extractor.conv1.weight"), tower["conv1.weight"]
    )


def test_half_precision_checkpoint_is_still_the_base() -> None:
    model, slim = MiniSan.with_tower(small_tower()).half(), small_slim()
    result = converted(model, slim)
    assert result.weights == "slim"
    assert {t.dtype for t in result.state.values()} == {torch.float16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if ".ln_2." not in k}, "lacks transformer.resbl"),
        (lambda s: {**s, "clip_rec_head.proj": torch.ones(32, 8)}, r"its proj has shape \(32, 8\)"),
        (lambda s: {k: v for k, v in s.items() if "rec_head" not in k}, "is not MendelXu/SAN"),
        (
            lambda s: {
                k.replace("rec_head.resblocks.0", "rec_head.resblocks.1"): v for k, v in s.items()
            },
            "has 5 CLIP blocks here, the slim tower has 4",
        ),
    ],
)
def test_convert_refuses_another_base(change: Any, message: str) -> None:
    state = change(MiniSan.with_tower(small_tower()).state_dict())
    with pytest.raises(TargetError, match=message):
        SAN.convert(state, small_slim())


def test_convert_refuses_a_slim_checkpoint_of_the_framework() -> None:
    model, slim = MiniSan.with_tower(small_tower()), small_slim()
    with pytest.raises(TargetError, match="slim already"):
        SAN.convert(converted(model, slim).state, slim)


def test_untrained_base_needs_force() -> None:
    model, slim = MiniSan.with_tower(small_tower()), small_slim(trained=False)
    with pytest.raises(TargetError, match="random weights .*--force"):
        converted(model, slim)
    assert converted(model, slim, force=True).weights == "slim"


def test_target_weights_need_a_checkpoint() -> None:
    with pytest.raises(TargetError, match="no checkpoint of it was given"):
        SAN.convert(None, small_slim(), weights="target")


def test_unknown_weights() -> None:
    with pytest.raises(OptionError, match="expected 'slim', 'target' or 'auto'"):
        SAN.convert(None, small_slim(), weights="both")


def test_wrong_activation_is_refused() -> None:
    model = MiniSan.with_tower(small_tower(), "gelu")
    with pytest.raises(TargetError, match="is gelu, but .* was pruned with quick_gelu"):
        SAN.attach(model, small_slim())
    assert not any(isinstance(m, SlimAttention) for m in model.modules())


def test_another_model_is_refused() -> None:
    assert not SAN.detect(nn.Linear(2, 2))
    with pytest.raises(TargetError, match="Linear is not MendelXu/SAN: expected blocks under"):
        SAN.attach(nn.Linear(2, 2), small_slim())


def test_other_head_count_is_refused() -> None:
    model = MiniSan.with_tower(small_tower())
    model.clip_visual_extractor.resblocks[0].attn.num_heads = 2  # type: ignore[index, union-attr]
    with pytest.raises(TargetError, match="resblocks.0.attn has 2 heads, the base .* has 4"):
        SAN.attach(model, small_slim())


def test_load_leaves_a_model_that_does_not_fit_as_it_was(tmp_path: Path) -> None:
    model, slim = MiniSan.with_tower(small_tower()), small_slim()
    write_output(tmp_path / "out", converted(model, slim), {"target": "san"}, "")
    other = MiniSan.with_tower(small_tower())
    other.side_adapter_network = nn.Linear(3, 7)
    before = dict(other.named_modules())
    with pytest.raises(TargetError, match=r"side_adapter_network.weight is \(5, 3\)"):
        load_into(other, tmp_path / "out")
    assert dict(other.named_modules()) == before
    load_into(other, tmp_path / "out", strict=False)
    assert any(isinstance(m, SlimAttention) for m in other.modules())
    with pytest.raises(TargetError, match="slim already"):
        load_into(other, tmp_path / "out")


def test_load_refuses_damage(tmp_path: Path) -> None:
    model, slim = MiniSan.with_tower(small_tower()), small_slim()
    out = tmp_path / "out"
    write_output(check_transfer_output(out, False), converted(model, slim), {"target": "san"}, "")
    with pytest.raises(CheckpointError, match="cannot be read.*`ovsprune transfer` wrote"):
        load_into(model, tmp_path)
    record = (out / "transfer.json").read_text()
    (out / "transfer.json").write_text(record.replace('"cuts"', '"cats"'))
    with pytest.raises(CheckpointError, match="lacks cuts"):
        load_into(model, out)
    (out / "transfer.json").write_text(record[:50])
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        load_into(model, out)
    (out / "transfer.json").write_text(record)
    raw = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="does not have the recorded SHA-256"):
        load_into(model, out)
