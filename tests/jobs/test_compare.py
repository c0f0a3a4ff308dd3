"""Comparison on a small untrained tower: contents of the rows, and resumption of a run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ovsprune.baselines.torch_pruning import TORCH_PRUNING_METHODS
from ovsprune.comparison.grid import reference_method
from ovsprune.comparison.runner import ComparisonRunner
from ovsprune.comparison.setup import SCENE_SEED
from ovsprune.core.errors import DataError, OptionError, OutputError, UnknownNameError, WeightsError
from ovsprune.core.progress import Silent
from ovsprune.evaluation.backbone_scores import class_embeddings, score_backbone
from ovsprune.evaluation.datasets import ScenesData
from ovsprune.jobs.compare import compare
from ovsprune.jobs.prune import prune
from tests.tiers import by_default

QUICK = {"samples": 4, "batch_size": 4, "scenes": 4, "threads": 1}
METHODS = ["default,random+closed-form,random", "torch-pruning,torch-pruning+closed-form"]
ROW = {
    "method",
    "ratio",
    "seed",
    "macs",
    "params",
    "miou",
    "retention",
    "relative_error",
    "seconds",
    "made_by",
}


@pytest.fixture(scope="module")
def complete(small_clip, tmp_path_factory):
    """Return the record of a comparison that was not interrupted."""
    place = tmp_path_factory.mktemp("compare") / "complete"
    return compare(small_clip, [0.2, 0.5], methods=METHODS, seeds=2, output=place, **QUICK)


def plain(row):
    """Return a row without its seconds."""
    return {key: value for key, value in row.items() if key != "seconds"}


def test_rows_are_complete_and_in_order(complete):
    names = [name for given in METHODS for name in given.split(",")]
    assert complete["methods"] == names
    assert [(r["ratio"], r["method"], r["seed"]) for r in complete["rows"]] == [
        (ratio, name, seed) for ratio in (0.2, 0.5) for name in names for seed in (0, 1)
    ]
    dense = complete["dense"]
    for row in complete["rows"]:
        assert set(row) >= ROW
        if row["status"] == "unreachable":
            continue
        assert 1 - row["macs"] / dense["macs"] == pytest.approx(row["ratio"], abs=0.01)
        assert row["params"] < dense["params"]
        assert row["retention"] == pytest.approx(row["miou"] / dense["miou"])
        assert row["relative_error"] > 0 and row["seconds"] > 0


def test_unreachable_torch_pruning_row_has_a_reason(complete):
    rows = {(r["method"], r["ratio"]): r for r in complete["rows"]}
    assert rows["torch-pruning", 0.2]["status"] == "done"
    assert rows["torch-pruning+closed-form", 0.5]["status"] == "done"
    far = rows["torch-pruning", 0.5]
    assert (far["status"], far["miou"], far["macs"]) == ("unreachable", None, None)
    assert "removed at most 0.3" in far["reason"]


def test_row_has_the_costs_of_prune(complete, small_clip):
    options = {"samples": 4, "batch_size": 4, "seed": 1}
    spec = prune(small_clip, 0.5, **options).spec
    row = next(
        r for r in complete["rows"] if (r["method"], r["ratio"], r["seed"]) == ("default", 0.5, 1)
    )
    assert (row["macs"], row["params"]) == (spec.slim.macs, spec.slim.params)


def test_recovery_reduces_the_error_of_the_features(complete):
    error = {(e["method"], e["ratio"]): e["relative_error"]["mean"] for e in complete["summary"]}
    for ratio in (0.2, 0.5):
        assert error["random+closed-form", ratio] < error["random", ratio]


def test_files_of_a_comparison(complete, tmp_path):
    place = tmp_path.__class__(complete["output"])
    names = {path.name for path in place.iterdir()}
    assert names == {"settings.json", "rows.jsonl", "compare.json", "README.md", "curves.png"}
    assert json.loads((place / "compare.json").read_text()) == complete
    page = (place / "README.md").read_text()
    assert "## 50% of the MACs removed" in page and "`torch-pruning at 0.5`" in page
    assert "The weights are random" in page
    with Image.open(place / "curves.png") as picture:
        assert picture.width > 800
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100


def test_rows_of_other_versions_are_reported(small_clip, tmp_path, monkeypatch):
    run = {"methods": "random", "output": tmp_path / "rows", "seeds": 1, **QUICK}
    first = compare(small_clip, [0.2], **run)
    assert torch.__version__ in first["rows"][0]["made_by"]
    progress = Silent()
    compare(small_clip, [0.2], progress=progress, **run)
    assert not any("made by" in note for note in progress.notes)
    monkeypatch.setattr("ovsprune.comparison.identity.__version__", "99.0")
    second = compare(small_clip, [0.2, 0.3], progress=progress, **run)
    old = first["rows"][0]["made_by"]
    assert f"made by {old}: 1 of these rows; --overwrite makes all anew" in progress.notes
    assert [row["made_by"].startswith("ovsprune 99.0,") for row in second["rows"]] == [False, True]
    page = (tmp_path / "rows" / "README.md").read_text()
    assert f"{old} (1 row)" in page and "ovsprune 99.0, torch" in page


def test_reference_is_a_method_that_reached_a_ratio():
    rows = [{"method": "default", "status": "unreachable"}, {"method": "random", "status": "done"}]
    record = {"methods": ["default", "imp", "random"], "rows": rows}
    assert reference_method(record) == "random"
    assert reference_method({**record, "rows": rows[:1]}) == "default"


def test_differences_are_relative_to_the_default(complete):
    assert {gap["reference"] for gap in complete["differences"]} == {"default"}
    gap = next(g for g in complete["differences"] if (g["method"], g["ratio"]) == ("random", 0.5))
    errors = {
        name: [
            r["relative_error"]
            for r in complete["rows"]
            if (r["method"], r["ratio"]) == (name, 0.5)
        ]
        for name in ("default", "random")
    }
    assert gap["relative_error"]["mean"] == pytest.approx(
        sum(errors["default"]) / 2 - sum(errors["random"]) / 2
    )


def test_interrupted_run_is_resumed(complete, small_clip, tmp_path, monkeypatch):
    """Run is stopped after three rows, while the fourth is written."""
    made, real = [], ComparisonRunner.row

    def counted(self, method, ratio, seed):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append((method.name, ratio, seed))
        return real(self, method, ratio, seed)

    names = ("random", "torch-pruning+closed-form")
    run = {"methods": names, "seeds": 2, "output": tmp_path / "cut", **QUICK}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ComparisonRunner, "row", counted)
        compare(small_clip, [0.2, 0.5], **run)
    with open(tmp_path / "cut" / "rows.jsonl", "ab") as file:
        file.write(b'{"method": "ran')
    first = list(made)

    def rest(self, method, ratio, seed):
        made.append((method.name, ratio, seed))
        return real(self, method, ratio, seed)

    monkeypatch.setattr(ComparisonRunner, "row", rest)
    progress = Silent()
    record = compare(small_clip, [0.2, 0.5], progress=progress, **run)
    assert "3 of 8 rows are in" in progress.notes[-1]
    assert len(made) == len(set(made)) == 8 and made[:3] == first
    expected = [plain(r) for r in complete["rows"] if r["method"] in names]
    assert [plain(r) for r in record["rows"]] == expected
    assert record["dense"] == complete["dense"]
    summaries = [
        {(e["method"], e["ratio"]): e["miou"] for e in found["summary"]}
        for found in (record, complete)
    ]
    assert len(summaries[0]) == 4 and summaries[0].items() <= summaries[1].items()

    monkeypatch.setattr(ComparisonRunner, "row", counted)  # Would stop at once.
    made[:] = [None] * 3
    again = compare(small_clip, [0.5], **{**run, "methods": ["random"], "seeds": 1})
    assert [r["miou"] for r in again["rows"]] == [
        r["miou"]
        for r in complete["rows"]
        if (r["method"], r["ratio"], r["seed"]) == ("random", 0.5, 0)
    ]


SMALL = {"methods": ["random"], "seeds": 1}


def test_rows_of_other_settings_are_refused(small_clip, tmp_path):
    run = {**SMALL, "output": tmp_path / "out"}
    first = compare(small_clip, [0.5], **run, **QUICK)
    with pytest.raises(OutputError, match=r"other settings \(samples 4, now 5\).*--overwrite"):
        compare(small_clip, [0.5], **run, **{**QUICK, "samples": 5})
    with pytest.raises(OutputError, match=r"other settings \(images 4, now 3\)"):
        compare(small_clip, [0.5], **run, **{**QUICK, "scenes": 3})
    again = compare(small_clip, [0.5], overwrite=True, **run, **{**QUICK, "scenes": 3})
    assert (first["images"], again["images"]) == (4, 3)
    assert len((tmp_path / "out" / "rows.jsonl").read_text().splitlines()) == 2  # Dense, and one.


def test_changed_images_under_the_same_path_are_refused(small_clip, tmp_path):
    """Fingerprints of the folders differ, although paths and numbers of files are the same."""
    data, photos = tmp_path / "data", tmp_path / "photos"
    for folder in (photos, data / "images", data / "labels"):
        folder.mkdir(parents=True)
    for i in range(4):
        for file in (photos / f"{i}.bmp", data / "images" / f"{i}.png"):
            Image.fromarray(np.full((32, 32, 3), 50 * i, np.uint8)).save(file)
        Image.fromarray(np.arange(1024, dtype=np.uint8).reshape(32, 32) % 2).save(
            data / "labels" / f"{i}.png"
        )
    (data / "classes.json").write_text('{"void": null, "classes": {"0": "cow", "1": "grass"}}')
    run = {**SMALL, **QUICK, "data": data, "calibration": str(photos), "output": tmp_path / "out"}
    run["scenes"] = None
    compare(small_clip, [0.3], **run)
    label = next((data / "labels").iterdir())
    before = label.read_bytes()
    Image.fromarray(1 - np.asarray(Image.open(label))).save(label)
    with pytest.raises(OutputError, match=r"other settings \(labelled pictures .*--overwrite"):
        compare(small_clip, [0.3], **run)
    label.write_bytes(before)
    settings = tmp_path / "out" / "settings.json"
    complete = json.loads(settings.read_text())
    old = {name: value for name, value in complete.items() if not name.endswith(" pictures")}
    settings.write_text(json.dumps(old))
    compare(small_clip, [0.3], **run)  # of a version that did not write them: taken, and added
    assert json.loads(settings.read_text()) == complete
    size = (photos / "1.bmp").stat().st_size
    Image.fromarray(np.full((32, 32, 3), 7, np.uint8)).save(photos / "1.bmp")
    assert (photos / "1.bmp").stat().st_size == size
    with pytest.raises(OutputError, match=r"other settings \(calibration pictures .*--overwrite"):
        compare(small_clip, [0.3], **run)


def test_inapplicable_method_is_an_unreachable_row(small_clip, tmp_path):
    record = compare(
        small_clip, [0.3], methods=["random", "bn-scale"], seeds=1, output=tmp_path / "out", **QUICK
    )
    done, other = record["rows"]
    assert done["status"] == "done" and done["miou"] is not None
    assert other["status"] == "unreachable" and "scale of a norm" in other["reason"]
    assert other["miou"] is None
    assert "scale of a norm" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture(scope="module")
def plain_run(small_clip, tmp_path_factory):
    """Make a comparison with default options, and return its arguments."""
    run = {**SMALL, **QUICK, "output": tmp_path_factory.mktemp("compare") / "plain"}
    compare(small_clip, [0.3], **run)
    return run


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("budget", "params", "budget the default, now params"),
        ("protect", ["*.0.mlp"], r"protect the default, now \['\*.0.mlp'\]"),
        ("round_to", 8, "round_to the default, now 8"),
        ("centred", True, "centred the default, now True"),
    ],
)
def test_rows_of_other_options_are_refused(small_clip, plain_run, option, value, message):
    with pytest.raises(OutputError, match=rf"other settings \({message}\).*--overwrite"):
        compare(small_clip, [0.3], **plain_run, **{option: value})


def test_default_options_are_not_in_the_settings(plain_run):
    """Settings contain only options that differ from the defaults."""
    settings = json.loads((plain_run["output"] / "settings.json").read_text())
    assert not {"budget", "protect", "round_to", "centred"} & set(settings)


def test_rows_of_options_are_refused_for_the_defaults(small_clip, tmp_path):
    run = {**SMALL, **QUICK, "output": tmp_path / "out"}
    compare(small_clip, [0.3], **run, round_to=8)
    with pytest.raises(OutputError, match=r"\(round_to 8, now the default\)"):
        compare(small_clip, [0.3], **run)


BOTH = ("magnitude", "torch-pruning", "torch-pruning+closed-form")


def test_budget_of_parameters(small_clip, tmp_path):
    record = compare(
        small_clip, [0.25], methods=BOTH, seeds=1, budget="params", output=tmp_path / "out", **QUICK
    )
    dense = record["dense"]
    assert record["budget"] == "params" and len(record["rows"]) == 3
    for row in record["rows"]:
        assert 1 - row["params"] / dense["params"] == pytest.approx(0.25, abs=0.01)
        assert row["achieved"] == pytest.approx(1 - row["params"] / dense["params"])
    page = (tmp_path / "out" / "README.md").read_text()
    assert "## 25% of the parameters removed" in page and "| parameters |" in page


def test_protected_layers_are_complete_and_widths_are_rounded(small_clip, tmp_path, monkeypatch):
    towers, real = {}, ComparisonRunner._prune

    def kept(self, method, settings, clock):
        towers[method.name] = real(self, method, settings, clock)
        return towers[method.name]

    monkeypatch.setattr(ComparisonRunner, "_prune", kept)
    record = compare(
        small_clip,
        [0.2],
        methods=BOTH,
        seeds=1,
        protect=["*.1.mlp"],
        round_to=8,
        centred=True,
        output=tmp_path / "out",
        **QUICK,
    )
    assert {row["status"] for row in record["rows"]} == {"done"}
    for name in BOTH:
        widths = [block.mlp.c_fc.out_features for block in towers[name].transformer.resblocks]
        assert widths[1] == 128 and min(widths) < 128, name
        assert all(width % 8 == 0 for width in widths), name
    page = (tmp_path / "out" / "README.md").read_text()
    assert "Options: `--protect *.1.mlp --round-to 8 --centred`." in page


def test_centred_scores_equal_those_of_evaluate(small_clip, tmp_path):
    run = {**SMALL, **QUICK, "scenes": 16}
    given = compare(small_clip, [0.3], **run, output=tmp_path / "given")
    centred = compare(small_clip, [0.3], **run, centred=True, output=tmp_path / "centred")
    data = ScenesData(16, seed=SCENE_SEED, size=48)
    embeddings = class_embeddings(small_clip, data.prompts)
    for record in (given, centred):
        expected = score_backbone(
            small_clip, embeddings, data, 4, Silent(), "", centred=record["centred"]
        )
        assert record["dense"]["miou"] == expected["miou"]
    assert given["dense"]["miou"] != centred["dense"]["miou"]


@pytest.mark.parametrize("name", by_default(TORCH_PRUNING_METHODS, {"torch-pruning"}))
def test_every_torch_pruning_selection_takes_our_recovery(small_clip, tmp_path, name):
    methods = [f"{name}+none", f"{name}+closed-form"]
    record = compare(small_clip, [0.5], methods=methods, seeds=1, output=tmp_path / "out", **QUICK)
    bare, repaired = record["rows"]
    assert (bare["method"], repaired["method"]) == tuple(methods)
    assert (bare["source"], repaired["source"]) == ("torch-pruning", "torch-pruning")
    assert bare["macs"] == repaired["macs"]  # The same selection.
    assert repaired["relative_error"] < bare["relative_error"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "methods",
    [
        ("torch-pruning", "torch-pruning+none", "torch-pruning+closed-form"),
        *((n,) for n in TORCH_PRUNING_METHODS if n != "torch-pruning"),
    ],
    ids=lambda methods: methods[0],
)
def test_unreachable_ratio_of_torch_pruning_is_reported(small_clip, tmp_path, methods):
    record = compare(small_clip, [0.95], methods=methods, seeds=1, output=tmp_path / "out", **QUICK)
    page = (tmp_path / "out" / "README.md").read_text()
    assert [row["method"] for row in record["rows"]] == list(methods)
    for row in record["rows"]:
        assert (row["status"], row["miou"]) == ("unreachable", None)
        assert f"{methods[0]} removed at most 0." in row["reason"]
        assert f"- `{row['method']} at 0.95`: {row['reason']}" in page
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["rows"] == record["rows"]


def test_imp_is_a_method(small_clip, tmp_path):
    methods = ["imp:imp-steps=1,random"]
    found = compare(small_clip, [0.3], methods=methods, seeds=1, output=tmp_path / "out", **QUICK)
    row = found["rows"][0]
    assert (row["method"], row["source"], row["status"]) == ("imp:imp-steps=1", "imp", "done")
    assert row["achieved"] == pytest.approx(0.3, abs=0.01)
    assert row["relative_error"] > 0


def test_half_precision_model_is_compared_in_float32(small_clip, tmp_path):
    import dataclasses
    from copy import deepcopy

    half = dataclasses.replace(small_clip, tower=deepcopy(small_clip.tower).half())
    options = {**QUICK, "seeds": 1, "methods": ["random,torch-pruning"]}
    found = compare(half, [0.2], output=tmp_path / "out", **options)
    assert all(row["status"] == "done" for row in found["rows"])
    assert next(half.tower.parameters()).dtype == torch.float16


def test_damaged_row_is_refused(small_clip, tmp_path):
    run = {**SMALL, "output": tmp_path / "out", **QUICK}
    compare(small_clip, [0.5], **run)
    rows = tmp_path / "out" / "rows.jsonl"
    rows.write_text("{broken\n" + rows.read_text())
    with pytest.raises(OutputError, match=r"rows.jsonl, line 1 is damaged.*--overwrite"):
        compare(small_clip, [0.5], **run)


def test_missing_matplotlib_is_a_note(small_clip, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    progress = Silent()
    record = compare(
        small_clip, [0.5], **SMALL, output=tmp_path / "out", progress=progress, **QUICK
    )
    assert record["plot"] is None and not (tmp_path / "out" / "curves.png").exists()
    assert any("pip install 'ovsprune[plots]'" in note for note in progress.notes)
    assert "curves.png" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("ratios", "options", "error", "message"),
    [
        ([], {}, OptionError, "--ratio is missing"),
        ([0.5, 1.0], {}, OptionError, r"--ratio 1 is outside \(0, 1\)"),
        ([0.5], {"seeds": 0}, OptionError, "--seeds 0 is out of range"),
        ([0.5], {"scenes": 0}, OptionError, "--scenes 0 is out of range"),
        ([0.5], {"methods": ["randon"]}, UnknownNameError, "Did you mean 'random'"),
        ([0.5], {"list_file": "x"}, OptionError, "--list x needs --data"),
        ([0.5], {"data": "nowhere"}, DataError, "nowhere has no folder images/"),
        ([0.5], {"text_embeddings": "nowhere.npz"}, DataError, "nowhere.npz"),
        ([0.5], {"device": "abacus"}, OptionError, "--device 'abacus' cannot be used"),
        ([0.5], {"budget": "latency"}, OptionError, "--budget latency cannot be compared"),
        ([0.5], {"budget": "seconds"}, OptionError, "--budget 'seconds' is unknown"),
        ([0.5], {"protect": ["*.77.*"]}, OptionError, r"--protect '\*.77.\*' matches no group"),
        ([0.5], {"round_to": 0}, OptionError, "--round-to 0: give at least 1"),
        (
            [0.5],
            {"methods": ["imp"], "round_to": 8},
            OptionError,
            "imp-structured does not take --round-to",
        ),
    ],
)
def test_refused_options_leave_nothing_behind(
    small_clip, tmp_path, ratios, options, error, message
):
    with pytest.raises(error, match=message):
        compare(small_clip, ratios, **{**QUICK, **SMALL, **options}, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_model_without_text_tower_needs_embeddings(small_clip, tmp_path):
    import dataclasses

    without_text = dataclasses.replace(small_clip, encoder=None)
    with pytest.raises(WeightsError, match="--text-embeddings"):
        compare(without_text, [0.5], **SMALL, output=tmp_path / "out", **QUICK)


def test_directory_with_other_contents_is_refused(small_clip, tmp_path):
    (tmp_path / "mine.txt").touch()
    for place, message in ((tmp_path, "holds no comparison"), (tmp_path / "mine.txt", "is a file")):
        with pytest.raises(OutputError, match=message):
            compare(small_clip, [0.5], **SMALL, output=place, overwrite=True, **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
