"""Files of measured statistics: contents, refusal of another origin, damaged files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ovsprune.calibration.statistics import Statistics, read_statistics, write_statistics
from ovsprune.core.errors import DataError, OutputError
from ovsprune.core.records import Curves, Scores

ORIGIN = {"base": "abc", "criterion": "reconstruction", "seed": 0, "probe": 8}


def statistics(curves: bool = True) -> Statistics:
    costs = {"a.mlp": torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)}
    measured = Curves(
        {"a.mlp": torch.tensor([1, 3])}, {"a.mlp": torch.tensor([0.5, 0.0], dtype=torch.float64)}
    )
    return Statistics(Scores.from_costs(costs), measured if curves else None, ORIGIN)


def test_statistics_are_read_as_written(tmp_path: Path) -> None:
    file = tmp_path / "new" / "statistics.safetensors"
    write_statistics(file, statistics())
    loaded = read_statistics(file, ORIGIN)
    assert torch.equal(loaded.scores.costs["a.mlp"], statistics().scores.costs["a.mlp"])
    assert loaded.scores.orders["a.mlp"].tolist() == [1, 2, 0]
    assert loaded.curves is not None
    assert loaded.curves.widths["a.mlp"].tolist() == [1, 3]
    assert loaded.curves.errors["a.mlp"].tolist() == [0.5, 0.0]
    assert [p.name for p in file.parent.iterdir()] == [file.name]  # no temporary files


def test_missing_curves_are_read_as_none(tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    write_statistics(file, statistics(curves=False))
    assert read_statistics(file, ORIGIN).curves is None


def test_extra_curves_are_accepted_if_no_curves_are_needed(tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    write_statistics(file, statistics())
    assert read_statistics(file, {**ORIGIN, "probe": 0}).curves is not None


def test_another_origin_is_refused_and_the_difference_is_named(tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    write_statistics(file, statistics())
    with pytest.raises(DataError, match="seed is 0 in the file and 1 now"):
        read_statistics(file, {**ORIGIN, "seed": 1})


@pytest.mark.parametrize("content", [b"", b"\x00" * 20, b'{"a": 1}'])
def test_damaged_files_are_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "s.safetensors"
    file.write_bytes(content)
    with pytest.raises(DataError, match="cannot be read for --statistics"):
        read_statistics(file, ORIGIN)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "s.safetensors")
    with pytest.raises(DataError, match="does not contain ovsprune.statistics"):
        read_statistics(tmp_path / "s.safetensors", ORIGIN)


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a directory"):
        write_statistics(tmp_path, statistics())
