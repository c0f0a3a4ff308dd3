"""CLIPSeg of transformers: slim equals masked, live and on disk, and the bounds can fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ovsprune.core.errors import TargetError
from ovsprune.graph.costs import count_costs, macs
from ovsprune.jobs.transfer import transfer
from ovsprune.slim.cutting import cut_state
from ovsprune.slim.load import tower_of
from ovsprune.slim.spec import LayerSpec
from ovsprune.targets import TARGETS, load_into
from ovsprune.targets.output import write_output
from tests.targets.by_hand import (
    error,
    load_pictures,
    masked,
    random_kept,
    saved,
    slim_by_hand,
    small_slim,
    small_tower,
    snapshot,
    unchanged,
)
from tests.targets.clipseg_models import WORDS, clipseg, outputs

pytestmark = pytest.mark.framework

BOUND = 1e-4
TARGET = TARGETS.get("clipseg")
LAYERS = "clip.vision_model.encoder.layers"
Gradients = dict[str, Tensor]


@torch.no_grad()
def run(model: Any, side: int = 32) -> dict[str, Tensor]:
    return outputs(model, load_pictures(2, side))


def dense_masked(model: Any, slim: Any, side: int = 32) -> dict[str, Tensor]:
    with masked(model, slim, TARGET.layout(model.state_dict(), 4)):
        return run(model, side)


def gradients(model: Any) -> Gradients:
    """Return the decoder's gradients of one step on two images; the framework freezes CLIP."""
    model.zero_grad()
    images = load_pictures(2, 32).double()
    labels = (images.mean(1) > 0).double()
    model(pixel_values=images, input_ids=WORDS, labels=labels).loss.backward()
    return {
        name: p.grad.clone()
        for name, p in model.decoder.named_parameters()
        # one number has no spread, and some gradients (the keys' biases) are zero but for rounding
        if p.grad is not None and p.numel() > 1 and bool(p.grad.abs().max() > 1e-12)
    }


@pytest.mark.parametrize("side", [32, 48])
def test_slim_equals_dense_masked(side: int) -> None:
    model, slim = clipseg(small_tower()), small_slim()
    dense, wanted = run(model, side), dense_masked(model, slim, side)
    with TARGET.attach(model, slim) as attached:
        found = run(model, side)
        assert attached.weights == "slim" and attached.params_after < attached.params_before
    errors = error(found, wanted)
    print(side, errors)
    assert max(errors.values()) <= BOUND
    assert min(error(dense, wanted).values()) > 100 * BOUND, "the cut must change every output"


def test_gradients_of_the_decoder_are_those_of_dense_masked() -> None:
    # in float64: the decoder's ReLUs turn a rounding error into another gradient
    model, slim = clipseg(small_tower()).double(), small_slim()
    dense = gradients(model)
    with masked(model, slim, TARGET.layout(model.state_dict(), 4)):
        wanted = gradients(model)
    with TARGET.attach(model, slim) as attached:
        assert attached.weights == "slim"
        found = gradients(model)
    assert found.keys() == wanted.keys() and len(found) > 20
    errors = error(found, wanted)
    print(max(errors.values()))
    assert max(errors.values()) <= BOUND
    assert max(error(dense, wanted).values()) > 100 * BOUND


def test_gradients_reach_every_kept_unit_of_a_tower_that_trains() -> None:
    """Compares the gradients of the vision model, run alone, for the kept units."""
    model, slim = clipseg(small_tower()), small_slim()
    layout = TARGET.layout(model.state_dict(), 4)
    images = load_pictures(2, 32)

    def tower_gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model.clip.get_image_features(pixel_values=images).pooler_output.square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return layout.tower_state(grads)

    with masked(model, slim, layout):
        for parameter in model.parameters():  # masked puts frozen consumers in
            parameter.requires_grad_(True)
        wanted = cut_state(tower_gradients(), slim.spec, slim.mask)
    with TARGET.attach(model, slim):
        found = tower_gradients()
    assert found.keys() == wanted.keys() and len(found) == len(slim.tower())
    weights = [name for name in wanted if wanted[name].ndim > 1 or ".ln_" in name]
    errors = error({n: found[n] for n in weights}, {n: wanted[n] for n in weights})
    assert max(errors.values()) <= BOUND, errors


@pytest.mark.parametrize("layer", ["transformer.resblocks.1.attn", "transformer.resblocks.2.mlp"])
def test_swapped_unit_is_caught(layer: str) -> None:
    tower = small_tower()
    model, slim = clipseg(tower), small_slim(tower)
    wanted = dense_masked(model, slim)
    kept = {name: chosen.tolist() for name, chosen in slim.mask.items()}
    other = sorted(set(range(slim.spec.layer(layer).units)) - set(kept[layer]))
    # the first may hardly matter, with other random numbers on another processor
    swapped = {**kept, layer: sorted({*kept[layer][2:], *other[:2]})}
    wrong = slim_by_hand(tower, swapped, heads=4, size=32, base=slim.spec.base)
    with TARGET.attach(model, wrong, weights="slim"):
        errors = error(run(model), wanted)
    print(layer, errors)
    assert errors["logits"] >= 100 * BOUND and errors["pooled"] >= 100 * BOUND


@pytest.mark.parametrize("which", "qkv")
def test_exchanged_projections_are_caught(which: str) -> None:
    """Exchanges two of the three parts of the in projection."""
    model, slim = clipseg(small_tower()), small_slim()
    wanted = dense_masked(model, slim)
    with TARGET.attach(model, slim):
        attention = model.get_submodule(f"{LAYERS}.1.self_attn")
        other = {"q": "k", "k": "v", "v": "q"}[which]
        mine, theirs = (getattr(attention, f"{x}_proj").weight for x in (which, other))
        with torch.no_grad():
            mine.copy_(theirs.clone())
        assert error(run(model), wanted)["pooled"] >= 100 * BOUND


def test_attach_detach_attach() -> None:
    model, slim = clipseg(small_tower()), small_slim()
    changed = {k: v + 0.01 if k.endswith("ln_1.bias") else v for k, v in slim.tensors.items()}
    slim = replace(slim, tensors=changed)
    before, modules, dense = snapshot(model), dict(model.named_modules()), run(model)
    states = []
    for _ in range(2):
        attached = TARGET.attach(model, slim, weights="slim")
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        heads = len(slim.mask["transformer.resblocks.1.attn"])
        width = f"{heads} of 4 heads, {8 * heads} outputs"
        assert attached.replaced[f"{LAYERS}.1.self_attn.k_proj"] == width
        assert attached.replaced[f"{LAYERS}.3.layer_norm1.bias"] == "value of the slim tower"
        attached.detach()
        assert unchanged(model, before)
        now = dict(model.named_modules())
        assert list(now) == list(modules) and all(now[name] is modules[name] for name in modules)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    after = run(model)
    assert all(torch.equal(after[name], dense[name]) for name in dense)
    assert not model._load_state_dict_pre_hooks


def test_framework_costs_drop_by_the_tower_costs() -> None:
    tower = small_tower()
    slim = slim_by_hand(tower, random_kept(4, 4, 64, 0), heads=4, size=32)
    model = clipseg(tower)
    every = {name: list(range(x.units)) for name, x in _layers(slim).items()}
    whole = tower_of(slim_by_hand(tower, every, heads=4, size=32)).tower
    dense, small = count_costs(whole, (32, 32)), count_costs(tower_of(slim).tower, (32, 32))
    with transfer(model, slim, "clipseg") as attached:
        assert attached.macs_before is not None and attached.macs_after is not None
        assert attached.macs_before - attached.macs_after == dense.macs - small.macs > 0
        assert attached.params_before - attached.params_after == dense.params - small.params > 0
        assert attached.macs_after == macs(model, **TARGET.example(model))  # type: ignore[arg-type]
        assert "pixel_values [1, 3, 32, 32]" in attached.counted_on


def _layers(slim: Any) -> dict[str, LayerSpec]:
    return {layer.name: layer for layer in slim.spec.layers}


def test_finetuned_tower_keeps_its_own_weights_cut_by_the_mask() -> None:
    tuned = {k: v * 1.05 for k, v in small_tower().items()}
    model, slim = clipseg(tuned), small_slim()
    wanted = dense_masked(model, slim)
    with TARGET.attach(model, slim) as attached:
        assert attached.weights == "target" and "finetuned CLIP" in attached.reason
        state = TARGET.layout(model.state_dict(), 4).tower_state(model.state_dict())
        cut = cut_state(tuned, slim.spec, slim.mask)
        assert all(torch.equal(state[name], tensor) for name, tensor in cut.items())
        assert max(error(run(model), wanted).values()) <= BOUND


def test_attention_and_mlp_may_be_removed_completely(tmp_path: Path) -> None:
    tower = small_tower()
    kept = {name: chosen.tolist() for name, chosen in small_slim(tower).mask.items()}
    gone = {"transformer.resblocks.1.attn": [], "transformer.resblocks.2.mlp": []}
    slim = slim_by_hand(tower, kept | gone, heads=4, size=32)
    model = clipseg(tower)
    wanted, before = dense_masked(model, slim), snapshot(model)
    with TARGET.attach(model, slim) as attached:
        assert attached.replaced[f"{LAYERS}.1.self_attn"] == "0 of 4 heads"
        errors = error(run(model), wanted)
        with pytest.raises(TargetError, match="slim already"):
            TARGET.attach(model, slim)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert max(errors.values()) <= BOUND, errors
    assert unchanged(model, before)
    result = TARGET.convert(model.state_dict(), slim)
    write_output(tmp_path / "out", result, {"target": "clipseg"}, "")
    fresh = clipseg(small_tower(seed=5))
    assert load_into(fresh, tmp_path / "out") == []
    assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in state.items())


def _other_width(slim: Any) -> Any:
    narrow = {k: v[:, :8] if k == "visual.proj" else v for k, v in slim.tensors.items()}
    return replace(slim, tensors=narrow)


def _other_size(slim: Any) -> Any:
    name = "visual.positional_embedding"
    return replace(slim, tensors={**slim.tensors, name: torch.zeros(10, 32)})


def _other_depth(slim: Any) -> Any:
    extra = {k.replace("resblocks.3", "resblocks.4"): v for k, v in slim.tensors.items()}
    return replace(slim, tensors={**slim.tensors, **extra})


def _other_activation(slim: Any) -> Any:
    return replace(slim, spec=replace(slim.spec, activation="gelu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_width, r"its proj has shape \(32, 16\), expected \(32, 8\)"),
        (_other_size, "has 16 patch positions, the base of .* has 9: .*another resolution"),
        (_other_depth, "has 4 CLIP blocks here, the slim tower has 5"),
        (_other_activation, "is quick_gelu, but .* was pruned with gelu"),
    ],
)
def test_refused_model_is_unchanged(change: Callable[[Any], Any], message: str) -> None:
    model, slim = clipseg(small_tower()), change(small_slim())
    before, modules = snapshot(model), dict(model.named_modules())
    with pytest.raises(TargetError, match=message):
        TARGET.attach(model, slim)
    assert unchanged(model, before) and dict(model.named_modules()) == modules


def test_other_head_count_and_slim_model_are_refused() -> None:
    slim = small_slim()
    with pytest.raises(TargetError, match="self_attn has 2 heads, the base .* has 4"):
        TARGET.attach(clipseg(small_tower(), heads=2), slim)
    model = clipseg(small_tower())
    with TARGET.attach(model, slim), pytest.raises(TargetError, match="slim already"):
        TARGET.attach(model, slim)


def test_attention_that_counts_heads_by_its_configuration_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Restores the view by num_heads of earlier versions of transformers."""
    model, slim = clipseg(small_tower()), small_slim()
    kind = type(model.get_submodule(f"{LAYERS}.0.self_attn"))

    def old(self: Any, hidden_states: Tensor) -> Tensor:
        shape = (*hidden_states.shape[:2], self.num_heads, self.head_dim)
        return self.q_proj(hidden_states).view(shape)  # type: ignore[no-any-return]

    monkeypatch.setattr(kind, "forward", old)
    with pytest.raises(TargetError, match="cannot have . of 4 heads .*5.6 or later"):
        TARGET.attach(model, slim)


def test_dense_checkpoint_is_refused_while_slim() -> None:
    model, slim = clipseg(small_tower()), small_slim()
    dense = dict(model.state_dict())
    with TARGET.attach(model, slim), pytest.raises(TargetError, match="not of the slim model"):
        model.load_state_dict(dense, strict=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of save_pretrained, with the indices that older versions saved."""
    model = clipseg(small_tower())
    path = tmp_path / "clipseg"
    model.save_pretrained(path)
    state = load_file(path / "model.safetensors")
    for part, count in (("text", 12), ("vision", 17)):
        index = torch.arange(count).expand(1, -1).contiguous()
        state[f"clip.{part}_model.embeddings.position_ids"] = index
    save_file(state, path / "model.safetensors", {"format": "pt"})
    (path / "preprocessor_config.json").write_text('{"do_resize": true}')
    (path / "notes.txt").write_text("mine")
    return path


def test_round_trip_from_folder_to_folder(tmp_path: Path, folder: Path) -> None:
    import transformers

    slim = saved(small_slim(), tmp_path / "slim")
    out = tmp_path / "out"
    record = transfer(slim=slim, target="clipseg", checkpoint=folder, output=out)
    assert record["weights"] == "slim"
    names = sorted(path.name for path in out.iterdir())
    assert names == [
        "config.json", "lines.py", "model.safetensors", "preprocessor_config.json", "transfer.json"
    ]  # fmt: skip
    model = clipseg(small_tower())
    keys = model.state_dict().keys()
    assert record["replaced"].keys() | record["kept"].keys() == keys
    dropped = {k for k in record["dropped"] if not k.startswith("slim: ")}
    assert dropped == {f"clip.{p}_model.embeddings.position_ids" for p in ("text", "vision")}
    assert record["kept"]["clip.logit_scale"] == "the text tower was not pruned"
    assert record["kept"]["decoder.film_mul.weight"] == "no part of the image tower"

    space: dict[str, Any] = {}
    exec(record["lines"], space)  # the lines as they are written
    fresh = space["model"]
    assert not fresh.training
    with TARGET.attach(model, small_slim()):
        wanted, state = model.state_dict(), fresh.state_dict()
        assert list(wanted) == list(state)
        assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
        found, expected = run(fresh), run(model)
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    with pytest.raises(RuntimeError, match="ismatch"):
        transformers.CLIPSegForImageSegmentation.from_pretrained(out)
    again = transfer(slim=slim, target="clipseg", checkpoint=folder, output=out, overwrite=True)
    assert again["replaced"] == record["replaced"]


def test_folder_of_several_files(tmp_path: Path, folder: Path) -> None:
    model = clipseg(small_tower())
    shards = tmp_path / "shards"
    model.save_pretrained(shards, max_shard_size="100KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    slim = saved(small_slim(), tmp_path / "slim")
    both = [
        transfer(slim=slim, target="clipseg", checkpoint=path, output=tmp_path / f"out{i}")
        for i, path in enumerate((folder, shards))
    ]
    one, other = (load_file(Path(r["output"]) / "model.safetensors") for r in both)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_clip_alone_has_the_framework_s_names() -> None:
    text = {
        "token_embedding.weight": torch.ones(64, 16),
        "transformer.resblocks.1.attn.in_proj_weight": torch.ones(48, 16),
        "text_projection": torch.ones(16, 16),
        "attn_mask": torch.ones(2),
    }
    converted = TARGET.convert(None, small_slim(text=text))
    state = clipseg(small_tower()).state_dict()
    assert converted.state.keys() < state.keys()
    assert "clip.text_model.encoder.layers.1.self_attn.k_proj.weight" in converted.state
    assert converted.dropped == {"slim: attn_mask": "this framework does not have it"}


def test_half_precision_checkpoint_is_still_the_base() -> None:
    model = clipseg(small_tower()).half()
    result = TARGET.convert(model.state_dict(), small_slim())
    assert result.weights == "slim"
    assert {t.dtype for t in result.state.values()} == {torch.float16}


def test_load_leaves_a_model_that_does_not_fit_as_it_was(tmp_path: Path, folder: Path) -> None:
    slim, out = saved(small_slim(), tmp_path / "slim"), tmp_path / "out"
    transfer(slim=slim, target="clipseg", checkpoint=folder, output=out)
    other = clipseg(small_tower())
    other.decoder.film_mul = nn.Linear(16, 9)
    before = snapshot(other)
    with pytest.raises(TargetError, match=r"decoder.film_mul.weight is \(16, 16\)"):
        load_into(other, out)
    assert unchanged(other, before)
    document = json.loads((out / "transfer.json").read_text())
    assert document["target"] == "clipseg" and document["depth"] == 4
