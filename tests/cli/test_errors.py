"""User errors: one clear message, exit status 2, no partial output."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from ovsprune import backbones
from ovsprune.cli.main import main


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Use one thread, because the tensors are small, and restore the number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def place(tmp_path, monkeypatch, small_clip):
    """Empty working directory in which --model small is the small CLIP."""
    monkeypatch.chdir(tmp_path)
    load = backbones.load_backbone
    monkeypatch.setattr(
        backbones,
        "load_backbone",
        lambda name, **rest: small_clip if name == "small" else load(name, **rest),
    )
    return tmp_path


def refused(*args) -> str:
    """Run a command that must fail, and return its message."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    return message


PRUNE = ["prune", "--model", "small", "--ratio", "0.5", "--samples", "4", "--threads", "1"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--ratio", "0"], "--ratio 0 is outside (0, 1)"),
        (["--ratio", "1"], "--ratio 1 is outside (0, 1)"),
        (["--ratio", "-0.5"], "--ratio -0.5 is outside (0, 1)"),
        (["--ratio", "nan"], "--ratio nan is outside (0, 1)"),
        (["--rounds", "0"], "--rounds 0: give at least 1"),
        (["--distill-steps", "0"], "--distill-steps 0: give at least 1"),
        (["--distill-seconds", "-1"], "--distill-seconds -1: give a finite number above 0"),
        (["--distill-lr", "0"], "--distill-lr 0: give a finite number above 0"),
        (["--distill-optimizer", "AdamV"], "unknown optimizer 'AdamV'. Did you mean 'Adam"),
        (["--ratio", "50"], "--ratio 50 is outside (0, 1)"),
        (["--model", "ViT-B/61"], "unknown model 'ViT-B/61'. Did you mean 'ViT-B-16'"),
        (["--criterion", "magnitud"], "unknown criterion 'magnitud'. Did you mean 'magnitude'"),
        (["--allocation", "unifrom"], "unknown allocation 'unifrom'. Did you mean 'uniform'?"),
        (["--recovery", "closed"], "unknown recovery 'closed'. Did you mean 'closed-form'?"),
        (["--budget", "watts"], "--budget 'watts' is unknown"),
        (["--dtype", "int4"], "--dtype 'int4' is unknown"),
        (["--samples", "0"], "--samples 0"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--round-to", "0"], "--round-to 0"),
        (["--threads", "0"], "--threads 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--protect", "nothing.*"], "--protect 'nothing.*' matches no group"),
        (["--protect", "*"], "everything is protected"),
        (["--floor", "*.mlp"], "--floor '*.mlp': give PATTERN=N"),
        (["--floor", "nothing=2"], "--floor 'nothing=2' matches no group"),
        (["--latency-table", "x.json"], "--latency-table goes with --budget latency only"),
        (["--calibration", "nowhere"], "nowhere is not a folder"),
        (["--ratio", "0.999"], "out of reach: the layers that may be pruned allow at most 0.6"),
        (["--model", "ViT-B/32", "--pretrained", "no-such-tag"], "'no-such-tag' is neither"),
    ],
)
def test_prune(place, args, message):
    assert message in refused(*PRUNE, *args)
    assert list(place.iterdir()) == []


COMPARE = ["compare", "--model", "small", "--ratio", "0.5", "--threads", "1"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--ratio", "1.5"], "--ratio 1.5 is outside (0, 1)"),
        (["--methods", "default,randon"], "unknown method 'randon'. Did you mean 'random'"),
        (["--methods", "random+closed"], "Did you mean 'closed-form'?"),
        (["--methods", "torch-pruning+uniform"], "torch-pruning has its own allocation"),
        (["--seeds", "0"], "--seeds 0 is out of range"),
        (["--data", "nowhere"], "nowhere has no folder images/"),
        (["--model", "ViT-B/61"], "unknown model 'ViT-B/61'. Did you mean 'ViT-B-16'"),
    ],
)
def test_compare(place, args, message):
    assert message in refused(*COMPARE, *args)
    assert list(place.iterdir()) == []


def test_compare_into_a_directory_with_other_files(place):
    (place / "compare" / "small").mkdir(parents=True)
    (place / "compare" / "small" / "mine").touch()
    assert "compare/small exists and holds no comparison" in refused(*COMPARE)


def test_compare_shows_tables_and_the_record_alone_on_stdout(place):
    quick = ["--samples", "4", "--scenes", "3", "--seeds", "1", "--methods", "random,magnitude"]
    result = CliRunner().invoke(main, [*COMPARE, *quick, "--json", "-"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert [row["method"] for row in record["rows"]] == ["random", "magnitude"]
    assert record["output"] == "compare/small"
    assert "50% of the MACs removed" in result.stderr
    assert (place / "compare" / "small" / "README.md").is_file()


def test_prune_into_an_existing_output(place):
    (place / "out").mkdir()
    (place / "out" / "mine").touch()
    assert "out exists already" in refused(*PRUNE, "-o", "out")
    assert [entry.name for entry in (place / "out").iterdir()] == ["mine"]


def test_prune_with_a_folder_of_damaged_images(place):
    pictures = place / "pictures"
    pictures.mkdir()
    assert "no image can be read (0 image files" in refused(*PRUNE, "--calibration", pictures)
    for name in ("a.jpg", "b.png"):
        (pictures / name).write_bytes(b"no picture")
    assert "no image can be read (2 image files, 2 of them damaged)" in refused(
        *PRUNE, "--calibration", pictures
    )
    assert not (place / "slim").exists()


def test_prune_lists_the_damaged_images_that_it_skips(place):
    pictures = place / "pictures"
    pictures.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (4, 48, 48, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(pictures / f"{number}.png")
    (pictures / "broken.png").write_bytes(b"no picture")
    result = CliRunner().invoke(
        main, [*PRUNE, "--calibration", "pictures", "--allocation", "uniform", "--dry-run"]
    )
    assert result.exit_code == 0, result.output
    assert "note: skipped" in result.stderr
    assert "broken.png" in result.stderr
    assert "Dry run: nothing was written." in result.stdout
    assert not (place / "slim").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--target", "sann"], "unknown target 'sann'. Did you mean 'san'"),
        (["--target", "san"], "no slim checkpoint was named, and there is none under"),
        (["--target", "san", "--slim", "nowhere"], "nowhere does not exist"),
        (["--target", "san", "--slim", "{slim}"], "untrained|random"),
        (
            ["--target", "san", "--slim", "{slim}", "--force", "--weights", "mine"],
            "weights is 'mine', expected",
        ),
        (
            ["--target", "san", "--slim", "{slim}", "--force", "--checkpoint", "no.pth"],
            "no.pth",
        ),
    ],
)
def test_transfer(place, slim, args, message):
    said = refused("transfer", *(arg.format(slim=slim) for arg in args))
    assert any(part in said for part in message.split("|")), said
    assert list(place.iterdir()) == []


def test_inspect(place, slim):
    assert "nowhere does not exist" in refused("inspect", "nowhere")
    (place / "file").touch()
    assert "file is a file; name the directory" in refused("inspect", "file")
    (place / "empty").mkdir()
    assert "config.json" in refused("inspect", "empty")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "mask.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "cut short", "changed"])
def test_damaged_checkpoints(place, slim, name, damage):
    shutil.copytree(slim, place / "broken")
    file = place / "broken" / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "cut short":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)
    assert name in refused("inspect", "broken")
    assert name in refused("benchmark", "--model", "broken", "--against", "small")
    assert name in refused("evaluate", "--model", "broken", "--data", "scenes")
    assert name in refused("transfer", "--target", "san", "--slim", "broken", "--force")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--data is missing"),
        (["--data", "nowhere"], "nowhere has no folder images/"),
        (["--data", "scenes", "--limit", "0"], "--limit 0"),
        (["--data", "scenes", "--batch-size", "-3"], "--batch-size -3"),
        (["--data", "scenes", "--text-embeddings", "no.npz"], "no.npz cannot be read"),
        (["--data", "scenes", "--device", "cuda:99"], "--device 'cuda:99' cannot be used here"),
        (["--data", "scenes", "--model", "tinny"], "unknown model 'tinny'. Did you mean 'tiny'?"),
    ],
)
def test_evaluate(place, args, message):
    assert message in refused("evaluate", "--model", "small", *args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--pairs", "0"], "--pairs 0"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--dtype", "float8"], "--dtype 'float8' is unknown"),
        (["--threads", "-1"], "--threads -1"),
        (["--against", "ViT-B/61"], "unknown model 'ViT-B/61'. Did you mean 'ViT-B-16'"),
    ],
)
def test_benchmark(place, args, message):
    assert message in refused("benchmark", "--model", "small", *args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--ratio", "1.5"], "--ratio 1.5 is outside (0, 1)"),
        (["--scenes", "0"], "--scenes 0 is too few"),
        (["--threads", "0"], "--threads 0"),
    ],
)
def test_demo(place, args, message):
    assert message in refused("demo", *args)
    assert list(place.iterdir()) == []
