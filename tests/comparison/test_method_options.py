"""Options after the name of a method: parsing, refusal, and equality with those of ``prune``."""

from __future__ import annotations

import pytest

from ovsprune.comparison.methods import parse_method, parse_methods
from ovsprune.core.distillation import Distillation
from ovsprune.core.errors import OptionError, UnknownNameError
from ovsprune.jobs.compare import compare
from ovsprune.jobs.prune import prune
from ovsprune.pruning.config import PruneConfig


def settings_of(name: str) -> PruneConfig:
    return parse_method(name).settings(PruneConfig(ratio=0.5))


def test_values_flags_and_repeated_options():
    config = settings_of("default : rounds = 3 : floor=*.mlp=0.25 : floor=*.attn=2")
    assert (config.rounds, config.floor) == (3, ("*.mlp=0.25", "*.attn=2"))
    assert settings_of("default:prune-depth").prune_depth
    assert settings_of("imp:imp-steps=7:imp-rewind").imp.steps == 7
    assert settings_of("imp").imp.steps == 100
    for name in ("default+distill", "torch-pruning+distill"):
        distilled = settings_of(f"{name}:distill-steps=9:distill-optimizer=Muon:distill-lr=3e-4")
        assert distilled.distill == Distillation(steps=9, optimizer="Muon", lr=3e-4)
        distilled.check()


def test_methods_with_different_options_are_different():
    methods = parse_methods(["default,default:rounds=2,default:rounds=2,default:rounds=3"])
    assert len(set(methods)) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("default:rounds", "rounds needs a value"),
        ("default:rounds=", "rounds needs a value"),
        ("default:rounds=two", "rounds needs a whole number, not 'two'"),
        ("default+distill:distill-lr=x", "distill-lr needs a number"),
        ("default:rounds=2:rounds=3", "rounds is given twice"),
        ("default:floor=*=2:floor=", "floor needs a value"),
        ("default:prune-depth=yes", "prune-depth takes no value; leave out '=yes'"),
        ("torch-pruning:rounds=2", "torch-pruning has its own selection"),
        ("torch-pruning+distill:floor=*=2", "torch-pruning has its own selection"),
    ],
)
def test_malformed_options_are_refused(name, message):
    with pytest.raises(OptionError, match=message):
        parse_method(name)


def test_unknown_option_names_the_closest():
    with pytest.raises(UnknownNameError, match="rounds"):
        parse_method("default:round=3")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("default:imp-steps=4", "--imp-steps"),
        ("imp:rounds=2", "--rounds"),
        ("random:distill-steps=4", "goes with --recovery distill"),
        ("torch-pruning:distill-steps=4", "goes with --recovery distill"),
        ("default:rounds=0", "--rounds 0: give at least 1"),
        ("default:floor=mlp", "--floor 'mlp'"),
    ],
)
def test_contradictory_options_are_refused_before_any_work(name, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        compare("no-such-model", [0.5], methods=[name], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_row_has_the_costs_of_prune_with_the_option(small_clip, tmp_path):
    """Rows of a comparison are independent: surveys of other groups are not shared."""
    quick = {"samples": 4, "batch_size": 4}
    options = {
        "default": {},
        "default:rounds=2": {"rounds": 2},
        "default:floor=*.mlp=0.6": {"floor": ("*.mlp=0.6",)},
        "default:uniform-heads": {"uniform_heads": True},
        "default:prune-depth": {"prune_depth": True},
    }
    record = compare(
        small_clip, [0.4], methods=list(options), seeds=1, scenes=4, output=tmp_path / "c", **quick
    )
    errors = {}
    for row in record["rows"]:
        spec = prune(small_clip, 0.4, **options[row["method"]], **quick).spec
        assert (row["status"], row["macs"], row["params"]) == (
            "done",
            spec.slim.macs,
            spec.slim.params,
        )
        errors[row["method"]] = row["relative_error"]
    del errors["default:prune-depth"]  # a cut this small drops nothing whole
    assert len(set(errors.values())) == len(errors)


def test_floor_without_a_match_is_refused_before_any_row(small_clip, tmp_path):
    quick = {"samples": 4, "batch_size": 4, "scenes": 4, "output": tmp_path / "c"}
    with pytest.raises(OptionError, match=r"--floor '\*\.mpl=0\.5' matches no group"):
        compare(small_clip, [0.4], methods=["random,random:floor=*.mpl=0.5"], seeds=1, **quick)
    assert not (tmp_path / "c").exists()


def test_options_of_all_rows_are_no_options_of_a_method(tmp_path):
    with pytest.raises(UnknownNameError, match="unknown option of a method 'samples'"):
        parse_method("default:samples=4")
    with pytest.raises(UnknownNameError, match="unknown option of compare 'rounds'"):
        compare("no-such-model", [0.5], rounds=2, output=tmp_path / "out")
