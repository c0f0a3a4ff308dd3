"""Options of a compared method: read, refused, and the same as the option of ``prune``."""

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
    found = settings_of("default : rounds = 3 : floor=*.mlp=0.25 : floor=*.attn=2")
    assert (found.rounds, found.floor) == (3, ("*.mlp=0.25", "*.attn=2"))
    assert settings_of("default:prune-depth").prune_depth
    assert settings_of("imp:imp-steps=7:imp-rewind").imp.steps == 7
    assert settings_of("imp").imp.steps == 100
    for name in ("default+distill", "torch-pruning+distill"):
        distilled = settings_of(f"{name}:distill-steps=9:distill-optimizer=Muon:distill-lr=3e-4")
        assert distilled.distill == Distillation(steps=9, optimizer="Muon", lr=3e-4)
        distilled.check()


def test_methods_that_differ_in_an_option_are_two():
    methods = parse_methods(["default,default:rounds=2,default:rounds=2,default:rounds=3"])
    assert len(set(methods)) == 3


@pytest.mark.parametrize(
    ("name", "said"),
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
def test_what_cannot_be_read_is_refused(name, said):
    with pytest.raises(OptionError, match=said):
        parse_method(name)


def test_an_unknown_option_names_the_closest():
    with pytest.raises(UnknownNameError, match="rounds"):
        parse_method("default:round=3")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("default:imp-steps=4", "--imp-steps"),
        ("imp:rounds=2", "--rounds"),
        ("random:distill-steps=4", "goes with --recovery distill"),
        ("torch-pruning:distill-steps=4", "goes with --recovery distill"),
        ("default:rounds=0", "--rounds 0: give at least 1"),
        ("default:floor=mlp", "--floor 'mlp'"),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_work(name, said, tmp_path):
    with pytest.raises(OptionError, match=said):
        compare("no-such-model", [0.5], methods=[name], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_row_is_what_prune_gives_with_that_option(small_clip, tmp_path):
    """And rows of one comparison do not disturb each other: surveys of other groups are others."""
    quick = {"samples": 4, "batch_size": 4}
    asked = {
        "default": {},
        "default:rounds=2": {"rounds": 2},
        "default:floor=*.mlp=0.6": {"floor": ("*.mlp=0.6",)},
        "default:uniform-heads": {"uniform_heads": True},
        "default:prune-depth": {"prune_depth": True},
    }
    record = compare(
        small_clip, [0.4], methods=list(asked), seeds=1, scenes=4, output=tmp_path / "c", **quick
    )
    errors = {}
    for row in record["rows"]:
        spec = prune(small_clip, 0.4, **asked[row["method"]], **quick).spec
        assert (row["status"], row["macs"], row["params"]) == (
            "done",
            spec.slim.macs,
            spec.slim.params,
        )
        errors[row["method"]] = row["relative_error"]
    del errors["default:prune-depth"]  # a cut this small drops nothing whole
    assert len(set(errors.values())) == len(errors)


def test_a_floor_that_matches_nothing_is_refused_before_any_row(small_clip, tmp_path):
    quick = {"samples": 4, "batch_size": 4, "scenes": 4, "output": tmp_path / "c"}
    with pytest.raises(OptionError, match=r"--floor '\*\.mpl=0\.5' matches no group"):
        compare(small_clip, [0.4], methods=["random,random:floor=*.mpl=0.5"], seeds=1, **quick)
    assert not (tmp_path / "c").exists()


def test_an_option_for_all_rows_is_no_option_of_a_method(tmp_path):
    with pytest.raises(UnknownNameError, match="unknown option of a method 'samples'"):
        parse_method("default:samples=4")
    with pytest.raises(UnknownNameError, match="unknown option of compare 'rounds'"):
        compare("no-such-model", [0.5], rounds=2, output=tmp_path / "out")
