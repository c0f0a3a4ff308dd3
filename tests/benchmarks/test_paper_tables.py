"""Paper's tables: limits of the plan, atomic rows, and a page that follows the rows."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "paper_tables"
NAMES = (
    "assemble", "backbone", "frameworks", "masks", "norms", "page", "paper", "places", "plan",
    "quality", "run", "timing", "towers", "training",
)  # fmt: skip


@pytest.fixture
def script(monkeypatch):
    """Import a script of the folder, and remove all scripts from sys.modules afterwards."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    for name in [n for n in sys.modules if n.partition(".")[0] in NAMES]:
        monkeypatch.delitem(sys.modules, name)
    before = list(sys.path)
    yield importlib.import_module
    sys.path[:] = before
    for name in [n for n in sys.modules if n.partition(".")[0] in NAMES]:
        del sys.modules[name]


def row(plan: Any, run: Any, miou: float) -> dict[str, Any]:
    score = {"miou": miou, "pixel_accuracy": 0.8, "images": 121, "seconds": 1.0}
    scheduled = run.framework == plan.SCHEDULED
    alphas = {"layer1.0.conv1.weight": 2.5, "layer4.1.conv3.weight": 3.5}
    return {
        "framework": run.framework, "mask": run.mask, "policy": run.policy, "seed": run.seed,
        "scores": {"msrc_test": score, "camvid_val": {**score, "miou": miou / 2}},
        "seconds": {"wall": 300.0, "cpu": 290.0},
        "settings": dataclasses.asdict(importlib.import_module("training").Settings()),
        "training_flops": {"total": 3_000_000_000_000} if scheduled else None,
        "chosen": ["layer4.1.conv3.weight"] if scheduled else None,
        "alphas": alphas if run.policy == "alpha" else None,
    }  # fmt: skip


def empty(**given: Any) -> dict[str, Any]:
    record = {"rows": [], "costs": [], "towers": [], "masks": {}, "backbone": None}
    return record | given


def test_the_plan_keeps_its_limits(script) -> None:
    plan = script("plan")
    runs = plan.runs()
    assert len(runs) + plan.BACKBONES <= plan.LIMIT == 48
    assert len({run.name for run in runs}) == len(runs)
    seeds = Counter((r.framework, r.mask) for r in runs if r.policy == "all")
    assert {count for (_, mask), count in seeds.items() if mask != "dense"} == {3}
    assert len(seeds) == 4 * 4
    assert {r.policy for r in plan.runs("table2")} == set(plan.POLICIES)
    assert all(a.seed <= b.seed for a, b in itertools.pairwise(runs))


def test_random_masks_have_exactly_as_many_zeros(script) -> None:
    masks = script("masks")
    shapes = {"a.weight": (7, 5), "b.weight": (3, 2, 3, 3)}
    found = masks.random_masks(shapes, 41, seed=1)
    assert sum(int((~mask).sum()) for mask in found.values()) == 41
    assert {name: tuple(mask.shape) for name, mask in found.items()} == shapes
    again, other = masks.random_masks(shapes, 41, 1), masks.random_masks(shapes, 41, 2)
    assert all(torch.equal(found[n], again[n]) for n in shapes)
    assert any(not torch.equal(found[n], other[n]) for n in shapes)


def test_a_page_without_rows_states_that_nothing_was_run(script) -> None:
    page, plan = script("page"), script("plan")
    text = page.render(empty())
    assert f"0 of the {len(plan.runs())}" in text
    assert "SAN (mmsegmentation's): 10 trainings of the plan (dense 0, random 0," in text
    assert "its training is not done" in text
    assert "Schedules: alpha against random: not run." in text
    assert "| Han et al. | dense | 46.0 |" in text  # the paper's own are there all the same
    assert "points" not in text


def test_the_page_reports_the_rows(script) -> None:
    page, plan = script("page"), script("plan")
    worth = {"dense": 0.6, "random": 0.3, "imp": 0.4, "structured": 0.5}
    policies = {"all": 0.0, "random": 0.02, "alpha": 0.01, "inverse": 0.0, "alpha-refresh": 0.0}
    rows = [
        row(plan, run, worth[run.mask] + policies[run.policy] + 0.01 * run.seed)
        for run in plan.runs()
        if run.framework != "fc-clip"
    ]
    text = page.render(empty(rows=rows))
    title = "Mask2Former (transformers')"
    seeds = "(3 seeds, paired, +10.0, +10.0, +10.0)"
    assert f"{title}: imp minus random: +10.0 ± 0.0 points {seeds}." in text
    assert "FC-CLIP's mask pooling, tower frozen: imp against random: not run." in text
    assert "| IMP mask (the paper's, unstructured) | 41.0 ± 1.0 | 20.5 ± 0.5 |" in text
    seeds = "(2 seeds, paired, -1.0, -1.0)"
    assert f"Schedules: alpha minus random: -1.0 ± 0.0 points {seeds}." in text
    assert "alpha does not beat a random half" in text and "![spectra](spectra.png)" in text
    assert "| alpha | 51.5 ± 0.7 |" in text and "47.2 at 159.6P" in text
    assert "| layer4.1.conv3.weight | 3.50 | trains |" in text
    assert "tower frozen: 10 trainings of the plan (dense 0," in text  # what is missing
    assert text.count("trainings of the plan (") == 1


def test_the_page_reports_towers_without_a_framework(script) -> None:
    page = script("page")
    key = {"backbone": "vit", "sparsity": 0.9}

    def scored(mask: str, seed: int, miou: float, error: float) -> dict[str, Any]:
        scores = {"msrc_test": {"miou": miou}, "camvid_val": {"miou": miou / 2}}
        return key | {"mask": mask, "seed": seed, "scores": scores, "relative_error": error}

    towers = [
        scored("dense", 0, 0.5, 0.0),
        scored("structured", 0, 0.4, 0.25),
        *(
            scored("random units + closed-form", s, 0.2 + 0.1 * s, 0.5)
            | {"gone": 1200, "macs": 300_000_000}
            for s in range(3)
        ),
        *(key | {"mask": "random units", "seed": s, "refused": "out of reach"} for s in range(3)),
    ]
    masks = {"vit-0.9": {"reached": False, "zeros": 1234, "tries": []}}
    text = page.render(empty(towers=towers, masks=masks))
    assert "| vit | 0.9 | dense | 0 | all | 50.0 | 25.0 | 0.000 | 1 |" in text
    repaired = "30.0 ± 10.0 | 15.0 ± 5.0 | 0.500 ± 0.000 | 3 |"
    assert f"| vit | 0.9 | random units + closed-form | 1,200 | 300 M | {repaired}" in text
    lot = "30.0 ± 10.0 (0.500 ± 0.000) by lot, repaired, too"
    assert f"The vit tower by itself at 0.9: structured 40.0 (0.250), and {lot}." in text
    assert (
        "| random units | 1,234 | not reached | not reached | not reached | not reached | 3 |"
        in text
    )


def test_the_page_reports_the_timings(script) -> None:
    page, plan, timing = script("page"), script("plan"), script("timing")
    # A turn that another program slows down (the second) slows both, and moves no ratio.
    assert timing._ratio([8.0, 40.0, 9.0], [10.0, 50.0, 10.0]) == pytest.approx(0.8)
    costs = {"params": 3e6, "nonzero": 2e6, "tower_params": 2e6, "tower_nonzero": 1e6,
             "macs": 9e8, "nonzero_macs": 5e8, "milliseconds": 70.0}  # fmt: skip
    shares = {"dense": 1.0, "random": 1.02, "imp": 0.99, "structured": 0.81}
    masks = {mask: {**costs, "of_dense": share} for mask, share in shares.items()}
    steps = {"framework": plan.SCHEDULED, "refresh": 125.0,
             "milliseconds": dict.fromkeys(plan.POLICIES, 1300.0),
             "of_all": {**dict.fromkeys(plan.POLICIES, 1.0), "alpha": 0.87}}  # fmt: skip
    text = page.render(empty(costs=[{"framework": "san", "masks": masks}], steps=[steps]))
    assert (
        "SAN (mmsegmentation's): structured takes 0.81 of the dense time, IMP's zeros 0.99." in text
    )
    assert "| 1.00 of 2.00 M | 2.00 M | 500 M | 900 M | 70.0 ms, 0.81 |" in text
    assert "| 1300 ms, 0.87 |" in text and "takes 125 ms more" in text


def test_an_unreachable_sparsity_is_reported(script) -> None:
    page = script("page")
    found = {"reached": False, "tries": [{"ratio": 0.9, "sparsity": 0.81}, {"error": "no"}]}
    text = page.render(empty(masks={"resnet-0.9": found}))
    assert "The resnet tower at 0.9: structured pruning does not reach it" in text
    assert "(its largest try removed 0.81)" in text
    # The other masks stand at what was asked, and the structured rows say why they are empty.
    found |= {"zeros": 900, "imp_rounds": 22}
    refused = {"backbone": "resnet", "sparsity": 0.9, "mask": "structured", "seed": 0,
               "refused": "no ratio of MACs leaves out so many weights"}  # fmt: skip
    text = page.render(empty(towers=[refused], masks={"resnet-0.9": found}))
    assert "The resnet tower by itself at 0.9: structured not reached" in text
    assert "not reached by structured pruning; IMP has 900 zeros after 22 rounds" in text


def test_rows_are_claimed_once_and_not_made_again(script, tmp_path, monkeypatch) -> None:
    training, plan = script("training"), script("plan")
    made: list[str] = []

    def train(run: Any, data: Path, work: Path, settings: Any) -> dict[str, Any]:
        made.append(run.name)
        assert not training.do(run, data, work, settings), "another worker holds this run"
        return row(plan, run, 0.5)

    monkeypatch.setattr(training, "train", train)
    run = plan.Run("san", "dense")
    assert training.do(run, tmp_path, tmp_path, training.Settings())
    assert not training.do(run, tmp_path, tmp_path, training.Settings())
    assert made == [run.name]
    assert json.loads((tmp_path / "rows" / f"{run.name}.json").read_text())["backbone"] == "vit"
    assert not list(tmp_path.rglob("*.part"))


def test_masks_in_work_elsewhere_do_not_block_other_rows(script, tmp_path, monkeypatch) -> None:
    run, training = script("run"), script("training")
    made: list[str] = []
    monkeypatch.setattr(run, "_ready", lambda backbone: True)
    monkeypatch.setattr(run, "write", lambda work: None)
    monkeypatch.setattr(run, "do", lambda one, *_: made.append(one.framework))
    monkeypatch.setattr(run.found_masks, "find", lambda *_: {})
    chosen = argparse.Namespace(data=tmp_path, work=tmp_path, only=None)
    with training.claimed(tmp_path / "locks" / "masks-resnet-0.5.lock") as mine:
        assert mine
        run._do_all(chosen, [], wait=False)
        assert set(made) == {"san"}
    run._do_all(chosen, [], wait=True)
    assert set(made) == {"san", "mask2former", "deeplabv3", "fc-clip"}


def test_a_failed_training_leaves_no_row_and_no_lock(script, tmp_path, monkeypatch) -> None:
    training, plan = script("training"), script("plan")

    def die(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", die)
    run = plan.Run("san", "dense")
    with pytest.raises(KeyboardInterrupt):
        training.do(run, tmp_path, tmp_path, training.Settings())
    assert not (tmp_path / "rows").exists()
    monkeypatch.setattr(training, "train", lambda run, *_: row(plan, run, 0.5))
    assert training.do(run, tmp_path, tmp_path, training.Settings())


class _Small(torch.nn.Module):
    """Framework of one layer."""

    target, frozen = "none", False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Conv2d(3, 4, 3, padding=1)

    def loss(self, images: torch.Tensor, labels: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        noise = 0.1 * torch.rand(())  # drawn anew at every step, as points of masks are
        return torch.nn.functional.cross_entropy(self.layer(images) + noise, labels)


def test_a_resumed_training_equals_an_uninterrupted_one(script, tmp_path, monkeypatch) -> None:
    training, plan, assemble = script("training"), script("plan"), script("assemble")
    kept = torch.tensor([True, False]).repeat(54).view(4, 3, 3, 3)
    built: list[_Small] = []

    def assembled(run: Any, classes: int, work: Path) -> Any:
        from ovsprune.masks import apply_masks

        module = _Small()
        built.append(module)
        masks = {"layer.weight": kept}
        apply_masks(module, masks, prefix="", hold=True)
        return assemble.Assembled(module, "none", frozenset(masks), module, 54, masks)

    class Batch:
        def __init__(self, step: int) -> None:
            generator = torch.Generator().manual_seed(step)
            self.images = torch.randn(2, 3, 8, 8, generator=generator)
            self.labels = torch.randint(0, 4, (2, 8, 8), generator=generator)

    stop: list[int] = []

    def batch(photos: Any, step: int, size: int, seed: int) -> Batch:
        if step in stop:
            raise KeyboardInterrupt
        return Batch(step)

    data = type(sys)("data")
    data.batch = batch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "data", data)
    monkeypatch.setattr(training, "assemble", assembled)
    monkeypatch.setattr(training, "photographs", lambda data: None)
    monkeypatch.setattr(training, "vocabulary", lambda photos: torch.zeros(4, 512))
    monkeypatch.setattr(training, "score", lambda *_: {"miou": 0.5})
    settings = training.Settings(steps=6, warmup=2)
    run = plan.Run("san", "imp", seed=2)
    whole = training.train(run, tmp_path, tmp_path / "a", settings, save_every=0.0)
    stop.append(4)
    with pytest.raises(KeyboardInterrupt):
        training.train(run, tmp_path, tmp_path / "b", settings, save_every=0.0)
    assert (tmp_path / "b" / "checkpoints" / f"{run.name}.pt").exists()
    stop.clear()
    resumed = training.train(run, tmp_path, tmp_path / "b", settings, save_every=0.0)
    assert resumed["last_loss"] == whole["last_loss"]
    assert torch.equal(built[0].layer.weight, built[2].layer.weight)
    assert not built[2].layer.weight[~kept].any() and built[2].layer.weight[kept].all()
    assert not (tmp_path / "b" / "checkpoints" / f"{run.name}.pt").exists()
    stop.append(4)
    with pytest.raises(KeyboardInterrupt):
        training.train(run, tmp_path, tmp_path / "b", settings, save_every=0.0)
    stop.clear()
    with pytest.raises(SystemExit, match="other settings"):
        training.train(run, tmp_path, tmp_path / "b", training.Settings(steps=7), save_every=0.0)


def test_a_record_continues_on_another_machine(script, tmp_path: Path) -> None:
    run, plan = script("run"), script("plan")
    rows = [row(plan, r, 0.4) for r in plan.runs()[:3]]
    towers = [
        {"backbone": "vit", "sparsity": 0.7, "mask": mask, "scores": {}}
        for mask in ("dense", "imp")
    ]
    masks = {"vit-0.5": {"reached": True, "zeros": 41}}
    results = tmp_path / "results.json"
    results.write_text(json.dumps(empty(rows=rows, towers=towers, masks=masks)))
    work = tmp_path / "work"
    run.restore(work, results)
    found = run.collect(work)
    assert (found["rows"], found["towers"], found["masks"]) == (rows, towers, masks)
    assert (work / "rows" / f"{plan.runs()[0].name}.json").is_file()

    own = work / "masks" / "vit-0.5" / "masks.json"
    own.parent.mkdir(parents=True)
    own.write_text(json.dumps({"reached": True, "zeros": 41}))
    run.collect(work)
    own.write_text(json.dumps({"reached": True, "zeros": 40}))
    with pytest.raises(SystemExit, match="zeros 40 here and 41 in the record"):
        run.collect(work)


def test_rows_of_two_recipes_do_not_mix(script, tmp_path: Path) -> None:
    run, plan, training = script("run"), script("plan"), script("training")
    first = plan.runs()[0]
    other = row(plan, first, 0.4)
    other["settings"]["steps"] += 1
    training.write_row(tmp_path / "rows" / f"{first.name}.json", other)
    with pytest.raises(SystemExit, match="made by another recipe"):
        run.collect(tmp_path)
    with pytest.raises(SystemExit, match="made by another recipe"):
        training.do(first, tmp_path, tmp_path, training.Settings())


def test_a_layer_too_narrow_for_a_fit_is_reported(script) -> None:
    page, plan = script("page"), script("plan")
    made = row(plan, plan.Run(plan.SCHEDULED, "structured", "alpha"), 0.5)
    made["alphas"]["layer4.0.conv2.weight"] = None
    assert "| layer4.0.conv2.weight | too narrow for a fit | frozen |" in page.render(
        empty(rows=[made])
    )


def test_statistics_are_those_of_the_input_of_masked_norms(
    script, tmp_path: Path, monkeypatch
) -> None:
    norms = script("norms")
    torch.manual_seed(0)
    tower = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    images = torch.randn(8, 3, 9, 9)

    class Pictures:
        def batches(self, size: int) -> Any:
            yield images

    from ovsprune.calibration import pictures

    monkeypatch.setattr(norms, "preprocess", lambda: None)
    monkeypatch.setattr(pictures, "open_pictures", lambda *_: (Pictures(), None))
    with torch.no_grad():
        tower[0].weight[:2] = 0.0
    norms.refresh(tower, tmp_path)
    read = tower[0](images)
    torch.testing.assert_close(tower[1].running_mean, read.mean((0, 2, 3)))
    assert not tower[1].training and tower[1].momentum == 0.1
