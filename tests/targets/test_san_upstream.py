"""MendelXu/SAN with the installed open_clip, live and on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ovsprune.core.errors import TargetError
from ovsprune.graph.costs import macs
from ovsprune.jobs.transfer import transfer
from ovsprune.slim import SlimAttention, SlimCheckpoint
from ovsprune.targets import TARGETS, apply_compat, load_into
from tests.targets import san_upstream as upstream
from tests.targets.by_hand import (
    error,
    lively_tower,
    masked,
    put,
    random_kept,
    saved,
    slim_by_hand,
    snapshot,
    unchanged,
)

pytestmark = pytest.mark.upstream

BOUND = 1e-4
TARGET = TARGETS.get("san")
DEPTH = upstream.SMALL["depth"]
HEAD = "clip_rec_head.resblocks"
Built = tuple[Any, SlimCheckpoint]


def small(directory: Path, cross: bool = False, seed: int = 0, classes: int = 3) -> Any:
    """Build a small SAN with random weights."""
    upstream.repository()
    apply_compat("san")
    upstream.small_clip(directory)
    options = [*upstream.SMALL_OPTIONS, "MODEL.SAN.REC_CROSS_ATTN", cross]
    options += ["MODEL.SAN.NUM_CLASSES", classes]
    model = upstream.build(upstream.config(upstream.BASE, "small-vit", options), seed)
    put(model, tower(seed), TARGET.layout(model.state_dict(), DEPTH))
    return model


def tower(seed: int = 0) -> dict[str, Tensor]:
    return lively_tower(**upstream.SMALL, mlp=upstream.SMALL_MLP, seed=seed)


def small_slim() -> SlimCheckpoint:
    kept = random_kept(DEPTH, 4, upstream.SMALL_MLP, seed=3)
    kept["transformer.resblocks.2.attn"] = [1, 3]
    kept["transformer.resblocks.3.attn"] = [0, 2, 3]  # the bias is gathered here
    return slim_by_hand(tower(), kept, heads=4, size=64)


@pytest.fixture(scope="module", params=[False, True], ids=["self attention", "cross_attn"])
def _built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return small(tmp_path_factory.mktemp("clip"), request.param), small_slim()


@pytest.fixture
def built(_built: Built) -> Iterator[Built]:
    """Build SAN with and without REC_CROSS_ATTN, and check that no test changes it."""
    before = snapshot(_built[0])
    yield _built
    assert unchanged(_built[0], before)


def wanted_of(model: Any, slim: SlimCheckpoint, images: Tensor) -> dict[str, Tensor]:
    depth = len({n.split(".")[2] for n in slim.tower() if n.startswith("transformer.")})
    with masked(model, slim, TARGET.layout(model.state_dict(), depth)):
        return upstream.run(model, images)


def test_it_is_recognised(built: Built) -> None:
    model, slim = built
    assert [name for name in TARGETS if TARGETS.get(name).detect(model)] == ["san"]
    assert TARGET.towers(model) == {
        "blocks 0-1": "clip_visual_extractor.resblocks",
        "blocks 2-3": HEAD,
    }
    weights, reason = TARGET.check(model, slim)
    assert weights == "slim"
    assert reason == f"all {len(tower()) - 1} tensors of the framework's tower equal the base's"


@pytest.mark.parametrize("side", [128, 192])
def test_slim_equals_dense_masked(built: Built, side: int) -> None:
    model, slim = built
    images = upstream.pictures(2, side)
    wanted, dense = wanted_of(model, slim, images), upstream.run(model, images)
    with TARGET.attach(model, slim) as attached:
        assert attached.weights == "slim" and attached.params_after < attached.params_before
        errors = error(upstream.run(model, images), wanted)
    print("slim", side, errors)
    assert max(errors.values()) <= BOUND
    assert min(error(dense, wanted).values()) > 100 * BOUND, "the cut must change every output"


def test_rolled_bias_is_caught(built: Built) -> None:
    model, slim = built
    images = upstream.pictures(2, 128)
    wanted = wanted_of(model, slim, images)

    def roll(module: nn.Module, given: Any, made: Any) -> Any:
        return made[0], [bias.roll(1, dims=1) for bias in made[1]]

    decoder = model.side_adapter_network.mask_decoder
    with TARGET.attach(model, slim):
        hook = decoder.register_forward_hook(roll)
        try:
            errors = error(upstream.run(model, images), wanted)
        finally:
            hook.remove()
    print("rolled", errors)
    assert errors["embeddings"] >= 100 * BOUND and errors["segmentation"] >= 100 * BOUND


@pytest.mark.parametrize("layer", ["transformer.resblocks.0.attn", "transformer.resblocks.3.attn"])
def test_swapped_head_is_caught(built: Built, layer: str) -> None:
    model, slim = built
    images = upstream.pictures(2, 128)
    wanted = wanted_of(model, slim, images)
    kept = {name: chosen.tolist() for name, chosen in slim.mask.items()}
    new = next(head for head in range(4) if head not in kept[layer])
    kept[layer] = sorted({*kept[layer], new} - {kept[layer][0]})
    wrong = slim_by_hand(tower(), kept, heads=4, size=64, base=slim.spec.base)
    with TARGET.attach(model, wrong):
        errors = error(upstream.run(model, images), wanted)
    print("swapped", layer, errors)
    assert errors["embeddings"] >= 100 * BOUND and errors["segmentation"] >= 100 * BOUND


def gradients(model: Any, images: Tensor) -> dict[str, Tensor]:
    """Return the gradients of all trained parameters after one step with a fixed seed."""
    model.train()
    model.zero_grad()
    torch.manual_seed(5)
    losses = model(upstream.train_input(images))
    sum(losses.values()).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.eval()
    # one number has no spread, and the keys' biases have no gradient but rounding
    return {n: g for n, g in found.items() if g.numel() > 1 and g.abs().max() > 1e-9}


def test_one_backward(tmp_path: Path, built: Built) -> None:
    """Uses float64, in which rounding does not switch a ReLU."""
    slim = built[1]
    cross = built[0].clip_rec_head.cross_attn
    torch.set_default_dtype(torch.float64)
    try:
        model = small(tmp_path, cross).double()
        model.criterion.float()  # SAN takes its losses in float32
        images = upstream.pictures(1, 128).double()
        dense = gradients(model, images)
        with masked(model, slim, TARGET.layout(model.state_dict(), DEPTH)):
            wanted = gradients(model, images)
        with TARGET.attach(model, slim, weights="target"):
            found = gradients(model, images)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(wanted) > 50 and found.keys() == wanted.keys()
    assert "clip_visual_extractor.positional_embedding" in wanted
    worst = max(error(found, wanted).values())
    moved = error(dense, {n: g for n, g in wanted.items() if n in dense})
    print("backward", len(wanted), worst, sorted(moved.values())[len(moved) // 2])
    assert worst <= BOUND
    assert sorted(moved.values())[len(moved) // 2] > 100 * BOUND


def test_attach_detach_attach(built: Built) -> None:
    model, slim = built
    changed = {k: v + 0.01 if k.endswith("ln_1.bias") else v for k, v in slim.tensors.items()}
    slim = replace(slim, tensors=changed)
    before, images = snapshot(model), upstream.pictures(1, 128)
    first, outputs = TARGET.attach(model, slim), upstream.run(model, images)
    assert isinstance(model.clip_rec_head.resblocks[1].attn, SlimAttention)
    first.detach()
    assert unchanged(model, before)
    with TARGET.attach(model, slim):
        again = upstream.run(model, images)
    assert all(torch.equal(again[name], value) for name, value in outputs.items())


def test_model_costs_drop_by_the_tower_costs(built: Built) -> None:
    model, slim = built
    images = upstream.pictures(1, 128)
    upstream.run(model, images)  # text embeddings are cached from here on
    given: dict[str, Any] = {}

    def parts() -> int:
        """Count the MACs of CLIP's blocks and stem for SAN's inputs."""
        front, head = model.clip_visual_extractor, model.clip_rec_head
        return macs(front, *given["front"]) + macs(head, *given["head"])

    hooks = [
        m.register_forward_pre_hook(lambda m, args, n=n: given.__setitem__(n, args))
        for n, m in (("front", model.clip_visual_extractor), ("head", model.clip_rec_head))
    ]
    upstream.run(model, images)
    for hook in hooks:
        hook.remove()
    whole, tower_before = macs(model, upstream.example(images)), parts()
    attached = TARGET.attach(model, slim)
    after, tower_after = macs(model, upstream.example(images)), parts()
    attached.detach()
    lost = sum(v.numel() for v in tower().values()) - sum(v.numel() for v in slim.tower().values())
    print("costs", whole, after, attached.params_before, attached.params_after)
    assert attached.params_before - attached.params_after == lost > 0
    assert whole - after == tower_before - tower_after > 0
    assert (tower_before - tower_after) / tower_before > 0.2


def test_round_trip_of_a_checkpoint(tmp_path: Path, built: Built) -> None:
    """Loads a transferred checkpoint of detectron2 into a freshly built SAN."""
    from detectron2.checkpoint import DetectionCheckpointer

    model, slim = built
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    saver = DetectionCheckpointer(model, save_dir=str(tmp_path), opt=optimiser)
    saver.save("model_final", iteration=7)
    record = transfer(
        slim=saved(slim, tmp_path / "slim"),
        target="san",
        checkpoint=tmp_path / "model_final.pth",
        output=tmp_path / "out",
    )
    assert record["weights"] == "slim" and {"opt", "iteration"} <= record["dropped"].keys()
    assert record["replaced"].keys() | record["kept"].keys() == model.state_dict().keys()
    fresh = small(tmp_path, model.clip_rec_head.cross_attn, seed=8)
    assert load_into(fresh, tmp_path / "out") == []
    images = upstream.pictures(1, 128)
    with TARGET.attach(model, slim):
        wanted, state = upstream.run(model, images), model.state_dict()
        assert list(state) == list(fresh.state_dict())
        assert all(torch.equal(fresh.state_dict()[k], v) for k, v in state.items())
    found = upstream.run(fresh, images)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    slim_saver = DetectionCheckpointer(fresh, save_dir=str(tmp_path))
    slim_saver.save("slim_final")
    again = small(tmp_path, model.clip_rec_head.cross_attn, seed=9)
    load_into(again, tmp_path / "out")
    DetectionCheckpointer(again).load(str(tmp_path / "slim_final.pth"))
    assert all(torch.equal(again.state_dict()[k], v) for k, v in fresh.state_dict().items())
    with pytest.raises(TargetError, match="not of the slim model"):
        DetectionCheckpointer(again).load(str(tmp_path / "model_final.pth"))


def test_finetuned_weights_are_cut_by_the_mask(built: Built) -> None:
    model, slim = built
    hashes = dict.fromkeys(slim.spec.base.tensors, "0" * 64)
    base = replace(slim.spec.base, tensors=hashes, half={})
    tuned = replace(slim, spec=replace(slim.spec, base=base))
    images = upstream.pictures(1, 128)
    wanted = wanted_of(model, slim, images)
    with TARGET.attach(model, tuned) as attached:
        assert attached.weights == "target"
        errors = error(upstream.run(model, images), wanted)
    assert max(errors.values()) <= BOUND


def test_restored_blocks_take_the_order_of_san(tmp_path: Path) -> None:
    """Compares with the forward pass of an unchanged open_clip model of the same weights."""
    import open_clip

    model = small(tmp_path)
    clip = open_clip.create_model("small-vit").eval()
    clip.visual.load_state_dict(tower())
    text = model.ov_classifier
    own = {n: v for n, v in text.state_dict().items() if n in clip.state_dict()}
    clip.load_state_dict(own, strict=False)
    tokens = open_clip.tokenize(["a photo of a cat", "a tree", "the sky"])
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        pairs = {"text": (text.encode_text(tokens), clip.encode_text(tokens))}
        front, head = model.clip_visual_extractor, model.clip_rec_head
        streams = front(images)
        x = torch.cat([streams["2_cls_token"], streams[2].flatten(2).permute(2, 0, 1)])
        for block in head.resblocks:
            x = block(x)
        pairs["image"] = (head.ln_post(x[0]) @ head.proj, clip.encode_image(images))
    for name, (found, expected) in pairs.items():
        assert error({name: found}, {name: expected})[name] < BOUND


@pytest.mark.parametrize(
    ("config", "clip", "sizes", "side"),
    [
        (
            upstream.BASE,
            "ViT-B-16-quickgelu",
            {"width": 768, "depth": 12, "heads": 12, "patch": 16, "size": 224, "outputs": 512},
            320,
        ),
        (
            upstream.LARGE,
            "ViT-L-14-336",
            {"width": 1024, "depth": 24, "heads": 16, "patch": 14, "size": 336, "outputs": 768},
            160,
        ),
    ],
    ids=["ViT-B/16", "ViT-L/14-336"],
)
def test_tower_has_the_model_size(config: str, clip: str, sizes: dict[str, int], side: int) -> None:
    """Runs SAN's two configurations with random weights, dense and slim."""
    upstream.repository()
    apply_compat("san")
    model = upstream.build(upstream.config(config, clip, []))
    dense = lively_tower(**sizes, mlp=4 * sizes["width"], seed=0)
    depth, heads = sizes["depth"], sizes["heads"]
    put(model, dense, TARGET.layout(model.state_dict(), depth))
    kept = random_kept(depth, heads, 4 * sizes["width"], seed=1)
    kept[f"transformer.resblocks.{depth - 1}.attn"] = list(range(1, heads, 2))
    activation = "quick_gelu" if clip.endswith("quickgelu") else "gelu"
    slim = slim_by_hand(dense, kept, heads=heads, size=sizes["size"], activation=activation)
    images = upstream.pictures(1, side)
    wanted = wanted_of(model, slim, images)
    with TARGET.attach(model, slim) as attached:
        errors = error(upstream.run(model, images), wanted)
    print(clip, side, errors, attached.params_before, attached.params_after)
    assert attached.weights == "slim" and max(errors.values()) <= BOUND
