"""CAT-Seg's code with a slim tower: outputs, trained parameters and checkpointer.

Runs where ``OVSPRUNE_CAT_SEG_REPO`` names a checkout, with a Python that has detectron2.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ovsprune.core.errors import TargetError
from ovsprune.slim import SlimAttention
from ovsprune.targets import TARGETS
from tests.targets import proofs
from tests.targets.by_hand import random_kept, slim_by_hand
from tests.targets.cat_seg_models import SMALL, VIT_B, Shape, cat_seg, install, loss, run
from tests.targets.proofs import Case

pytestmark = pytest.mark.upstream

CLIP = "sem_seg_head.predictor.clip_model"


def case_of(shape: Shape, build: Any) -> Case:
    tower = shape.tower()
    kept = random_kept(shape.depth, shape.heads, 4 * shape.width, seed=1)
    return Case(
        name="cat-seg",
        tower=tower,
        slim=slim_by_hand(tower, kept, heads=shape.heads, size=shape.size),
        build=build,
        run=run,
        loss=loss,
        heads=shape.heads,
        size=shape.size,
        counted=(shape.side, shape.side),
    )


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Case:
    install(monkeypatch)  # skips before anything is drawn
    return case_of(SMALL, lambda tower: cat_seg(monkeypatch, tmp_path, SMALL, tower))


@pytest.fixture
def model(case: Case) -> Any:
    return case.build(case.tower)


def test_is_recognised(case: Case, model: Any) -> None:
    knowing = [name for name in TARGETS if TARGETS.get(name).detect(model)]
    assert [name for name in knowing if not TARGETS.get(name).fallback] == ["cat-seg"]
    assert case.target.check(model, case.slim) == (
        "slim",
        f"all {len(case.tower)} tensors of the framework's tower equal the base's",
    )


def test_slim_equals_masked(case: Case, model: Any) -> None:
    proofs.slim_equals_masked(case, model)
    for layer in ("transformer.resblocks.2.attn", "transformer.resblocks.5.mlp"):
        proofs.swapped_unit_is_caught(case, model, layer)


def test_heads_of_the_last_block_may_be_removed(case: Case, model: Any) -> None:
    """Covers ``forward_dense``, which reads the three projection weights directly."""
    last = f"transformer.resblocks.{SMALL.depth - 1}.attn"
    slim = case.recut({last: [1, 3], "transformer.resblocks.4.attn": []})
    wanted = proofs.slim_equals_masked(case, model, slim)
    errors = proofs.error(case.attached(model, case.recut({last: [0, 3]})), wanted)
    assert errors["sem_seg"] > 100 * proofs.BOUND


def test_exchanged_projections_are_caught(case: Case, model: Any) -> None:
    wanted = case.masked(model)
    for which, other in ("qk", "vq"):
        with torch.no_grad(), case.target.attach(model, case.slim):
            block = model.get_submodule(f"{CLIP}.visual.transformer.resblocks.1")
            weight = block.attn.get_parameter(f"{which}_proj_weight")
            weight.copy_(block.attn.get_parameter(f"{other}_proj_weight").clone())
            assert proofs.error(run(model), wanted)["sem_seg"] > 100 * proofs.BOUND


def test_gradients_equal_masked(case: Case, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # its norms cast to float32 by themselves, which float64 weights do not allow
    norm = type(model.get_submodule(f"{CLIP}.visual.ln_pre"))
    monkeypatch.setattr(norm, "forward", nn.LayerNorm.forward)
    proofs.gradients_equal_masked(case, model)


def test_attach_detach_attach(case: Case, model: Any) -> None:
    proofs.attach_detach_attach(case, model)


def test_costs_drop_by_the_tower_costs(case: Case, model: Any) -> None:
    proofs.costs_drop_by_the_tower_costs(case, model)


def test_tuned_weights_are_cut(case: Case, model: Any) -> None:
    proofs.tuned_weights_are_cut(case, model)


def test_trained_parameters_stay_the_same(case: Case, model: Any) -> None:
    """Queries and values of both towers are trained; a step changes no other parameter."""
    learning = proofs.trained_parameters_stay(case, model)
    of_clip = {name for name in learning if name.startswith(CLIP)}
    assert {name.rpartition(".")[2] for name in of_clip} == {"q_proj_weight", "v_proj_weight"}
    assert len(of_clip) == 2 * (SMALL.depth + SMALL.text_depth)
    with case.target.attach(model, case.slim):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
        losses = []
        for _ in range(4):
            optimiser.zero_grad()
            value = loss(model)
            value.backward()
            optimiser.step()
            losses.append(float(value))
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    print(losses)
    assert losses[-1] < losses[0] and moved <= learning
    unread = f"{CLIP}.visual.transformer.resblocks.{SMALL.depth - 1}.attn.q_proj_weight"
    # weight decay moves even this one, which forward_dense computes and does not use
    assert unread in moved and of_clip <= moved


def test_full_finetuning_and_visual_prompts(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = cat_seg(
        monkeypatch, tmp_path, SMALL, case.tower, finetune="full", prompts=(SMALL.depth, 2)
    )
    prompts = f"{CLIP}.visual.transformer.prompt_tokens"
    proofs.slim_equals_masked(case, model)
    assert prompts in proofs.trained_parameters_stay(case, model)
    kept = case.target.convert(model.state_dict(), case.slim).kept
    assert kept[prompts] == "no part of the image tower"


@pytest.mark.parametrize("weights", ["auto", "target"])
def test_round_trip_with_its_own_checkpointer(
    case: Case, model: Any, tmp_path: Path, weights: str
) -> None:
    from detectron2.checkpoint import DetectionCheckpointer

    DetectionCheckpointer(model, str(tmp_path)).save("dense", iteration=7)
    fresh = case.build(SMALL.tower(seed=9))
    record = proofs.round_trip_on_disk(
        case, model, fresh, tmp_path, weights, file=tmp_path / "dense.pth"
    )
    assert record["weights"] == {"auto": "slim", "target": "target"}[weights]
    # its own checkpointer, which drops what has another shape, cannot make a mix
    with pytest.raises(TargetError, match="not of the slim model"):
        DetectionCheckpointer(fresh, str(tmp_path)).load(str(tmp_path / "dense.pth"))
    DetectionCheckpointer(fresh, str(tmp_path)).save("slim")
    again = case.build(SMALL.tower(seed=4))
    from ovsprune.targets import load_into

    load_into(again, tmp_path / "out")
    with torch.no_grad():
        again.upsample1.weight.zero_()
    DetectionCheckpointer(again, str(tmp_path)).load(str(tmp_path / "slim.pth"))
    assert all(torch.equal(again.state_dict()[k], v) for k, v in fresh.state_dict().items())


def test_refusals_leave_the_model_unchanged(case: Case, model: Any) -> None:
    before, modules = proofs.snapshot(model), dict(model.named_modules())
    slim = case.slim
    wrong = {
        "was pruned with gelu": replace(slim, spec=replace(slim.spec, activation="gelu")),
        "another resolution": replace(
            slim,
            tensors={**slim.tensors, "visual.positional_embedding": torch.zeros(50, SMALL.width)},
        ),
        "has 9 CLIP blocks here, the slim tower has 10": replace(
            slim,
            tensors={
                **slim.tensors,
                **{k.replace("blocks.8", "blocks.9"): v for k, v in slim.tensors.items()},
            },
        ),
    }
    for message, checkpoint in wrong.items():
        with pytest.raises(TargetError, match=message):
            case.target.attach(model, checkpoint)
    assert proofs.unchanged(model, before) and dict(model.named_modules()) == modules


def test_vit_b_16_at_its_real_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Covers the framework's configuration for ViT-B/16 at 384 pixels."""
    install(monkeypatch)
    case = case_of(VIT_B, lambda tower: cat_seg(monkeypatch, tmp_path, VIT_B, tower))
    model = case.build(case.tower)
    proofs.slim_equals_masked(case, model)
    proofs.costs_drop_by_the_tower_costs(case, model)
    with case.target.attach(model, case.slim):
        slim = [m for m in model.modules() if isinstance(m, SlimAttention)]
        assert len(slim) == VIT_B.depth - 1
