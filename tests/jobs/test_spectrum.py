"""Command ``spectrum`` on the embedded model and on a slim one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from ovsprune.cli.main import main
from ovsprune.core.errors import OptionError, OutputError
from ovsprune.jobs.spectrum import spectrum


def test_record_and_plot(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    options = ["--model", "tiny", "--plot", str(tmp_path / "p.png"), "--json", str(out)]
    done = CliRunner().invoke(main, ["spectrum", *options], standalone_mode=False)
    assert done.exit_code == 0, done.output
    record = json.loads(out.read_text())
    assert len(record["layers"]) == 1 + 6 * 6 and record["fit"] == "peak"
    first = record["layers"][1]
    assert first["name"] == "transformer.resblocks.0.attn.q" and first["shape"] == [192, 192]
    assert 1 < record["median_alpha"] < 10
    assert list(record["kinds"]) == ["conv1", "q", "k", "v", "out", "c_fc", "c_proj"]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "Median alpha" in done.output and "random" not in done.output


def test_a_slim_directory_has_its_own_shapes(tmp_path: Path) -> None:
    from ovsprune.jobs.prune import prune

    prune(
        "tiny", 0.5, samples=1, criterion="magnitude", allocation="uniform", recovery="none",
        output=tmp_path / "slim",
    )  # fmt: skip
    record = spectrum(str(tmp_path / "slim"), layers=["*.resblocks.0.*"], fit="least-ks")
    shapes = {layer["kind"]: layer["shape"] for layer in record["layers"]}
    assert len(shapes) == 6
    assert shapes["q"][0] < 192 and shapes["q"][1] == 192 and shapes["out"][1] == shapes["v"][0]
    assert shapes["c_fc"][0] < 768


def test_bad_options_are_refused_before_the_computation(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"--layer 'blocks\.\*' matches none of the 37 layers"):
        spectrum("tiny", layers=["blocks.*"])
    with pytest.raises(OutputError, match=r"plots are PNG files; give a name that ends in \.png"):
        spectrum("tiny", plot=tmp_path / "p.svg")
    with pytest.raises(OutputError, match="its directory does not exist; create it first"):
        spectrum("tiny", plot=tmp_path / "no" / "p.png")


def test_plot_accepts_layers_of_every_kind(tmp_path: Path) -> None:
    from torch import nn

    from ovsprune.report.spectra import _depths, draw
    from ovsprune.spectrum import matrices, spectra

    torch.manual_seed(0)
    flat = nn.Linear(12, 12)
    nn.init.orthogonal_(flat.weight)
    model = nn.ModuleDict(
        {"stem": nn.Conv2d(3, 16, 3), "layer1": nn.Sequential(nn.Linear(12, 12), flat),
         "layer2": nn.Sequential(nn.Linear(3, 3)), "head": nn.Linear(20, 9)}
    )  # fmt: skip
    measured = spectra(matrices(model))
    draw(measured, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000
    blocks = nn.ModuleDict(
        {"stem": nn.Linear(4, 4), "layer1": nn.ModuleList(nn.ModuleDict({"a": nn.Linear(4, 4)})
         for _ in range(2)), "layer2": nn.ModuleList([nn.ModuleDict({"a": nn.Linear(4, 4)})]),
         "head": nn.Linear(4, 4)}
    )  # fmt: skip
    assert _depths(spectra(matrices(blocks))) == [-1.0, 0.0, 1.0, 2.0, 3.0]
