"""Import of rows from earlier comparisons of the same model, images and options."""

from __future__ import annotations

import json

import pytest

from ovsprune.comparison.runner import ComparisonRunner
from ovsprune.core.errors import DataError, OptionError
from ovsprune.jobs.compare import compare

QUICK = {"samples": 4, "scenes": 4, "batch_size": 4}


@pytest.fixture(scope="module")
def first(small_clip, tmp_path_factory):
    """Return the record file of a comparison with one seed of one method."""
    place = tmp_path_factory.mktemp("earlier") / "first"
    compare(small_clip, [0.3], methods=["random"], seeds=1, output=place, **QUICK)
    return place / "compare.json"


def test_imported_rows_are_not_made_again(small_clip, first, tmp_path, monkeypatch):
    made, real = [], ComparisonRunner.row

    def noted(self, method, ratio, seed):
        made.append((method.name, ratio, seed))
        return real(self, method, ratio, seed)

    monkeypatch.setattr(ComparisonRunner, "row", noted)
    record = compare(
        small_clip,
        [0.3],
        methods=["random", "magnitude"],
        seeds=2,
        output=tmp_path / "now",
        earlier=[first],
        **QUICK,
    )
    assert sorted(made) == [("magnitude", 0.3, 0), ("magnitude", 0.3, 1), ("random", 0.3, 1)]
    before = json.loads(first.read_text())["rows"]
    assert record["rows"][0] == before[0] and len(record["rows"]) == 4
    made.clear()
    again = compare(
        small_clip,
        [0.3],
        methods=["random", "magnitude"],
        seeds=2,
        output=tmp_path / "again",
        earlier=[record, first],
        **QUICK,
    )
    assert made == [] and again["rows"] == record["rows"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 9}, "images 9, now 4"),
        ({"budget": "params"}, "budget params, now macs"),
        ({"calibration": "leaves"}, "calibration leaves, now mixed"),
        ({"dense": {"macs": 1}}, "dense macs 1, now"),
        ({"dense": {"miou": 0.9}}, "dense mIoU 0.9, now"),
    ],
)
def test_rows_of_another_comparison_are_refused(small_clip, first, tmp_path, change, message):
    record = json.loads(first.read_text())
    for name, value in change.items():
        record[name] = {**record[name], **value} if isinstance(value, dict) else value
    file = tmp_path / "other.json"
    file.write_text(json.dumps(record))
    run = {"methods": ["random"], "seeds": 1, "output": tmp_path / "now", **QUICK}
    with pytest.raises(OptionError, match=rf"other.json are of another comparison .*{message}"):
        compare(small_clip, [0.3], earlier=[file], **run)


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": []}', '{"rows": [{}], "dense": {}}'])
def test_file_that_is_no_record_is_refused(small_clip, tmp_path, text):
    file = tmp_path / "broken.json"
    file.write_text(text)
    run = {"methods": ["random"], "seeds": 1, "output": tmp_path / "now", **QUICK}
    with pytest.raises(DataError, match="broken.json is no record of a comparison"):
        compare(small_clip, [0.3], earlier=[file], **run)
