from __future__ import annotations

import pytest

from ovsprune.allocation import ALLOCATIONS
from ovsprune.baselines.torch_pruning import TORCH_PRUNING_METHODS
from ovsprune.comparison import methods as module
from ovsprune.comparison.methods import parse_method, parse_methods
from ovsprune.core.errors import OptionError, UnknownNameError
from ovsprune.importance import CRITERIA
from ovsprune.pruning.config import PruneConfig
from ovsprune.recovery import RECOVERIES


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("random", ("random", "uniform", "none")),
        ("random+closed-form", ("random", "uniform", "closed-form")),
        ("magnitude+sensitivity", ("magnitude", "sensitivity", "none")),
        ("magnitude+sensitivity+closed-form", ("magnitude", "sensitivity", "closed-form")),
        ("magnitude+closed-form+sensitivity", ("magnitude", "sensitivity", "closed-form")),
        (" magnitude + none ", ("magnitude", "uniform", "none")),
    ],
)
def test_parts_of_a_name(name, parts):
    method = parse_method(name)
    assert (method.criterion, method.allocation, method.recovery) == parts
    assert method.source == "ovsprune"


def test_imp_takes_no_other_part():
    method = parse_method("imp")
    settings = method.settings(PruneConfig(ratio=0.4, seed=2))
    assert (settings.method, settings.imp.structured, settings.seed) == ("imp", True, 2)
    settings.check()
    with pytest.raises(OptionError, match="imp has its own ranking, budget and repair"):
        parse_method("imp+closed-form")


def test_default_has_the_defaults_of_prune():
    plain, method = PruneConfig(ratio=0.5), parse_method("default")
    assert (method.criterion, method.allocation, method.recovery) == (
        plain.criterion,
        plain.allocation,
        plain.recovery,
    )
    assert parse_method("default+none").recovery == "none"
    assert parse_method("default+none").allocation == plain.allocation


@pytest.mark.parametrize("criterion", CRITERIA.names())
@pytest.mark.parametrize("recovery", RECOVERIES.names())
def test_registered_names_are_parts(criterion, recovery):
    for allocation in ALLOCATIONS.names():
        method = parse_method(f"{criterion}+{allocation}+{recovery}")
        assert (method.criterion, method.allocation, method.recovery) == (
            criterion,
            allocation,
            recovery,
        )


def test_name_in_several_registries_is_read_by_position(monkeypatch):
    class Both:
        """Plug-in that is registered several times."""

    for registry in (CRITERIA, ALLOCATIONS, RECOVERIES):
        registry.names()
        monkeypatch.setitem(registry._entries, "both", Both())
    method = parse_method("both+both+both")
    assert (method.criterion, method.allocation, method.recovery) == ("both", "both", "both")
    assert parse_method("random+both").allocation == "both"
    assert parse_method("random+both").recovery == "none"


@pytest.mark.parametrize("name", TORCH_PRUNING_METHODS)
def test_torch_pruning_methods(name):
    plain, repaired = parse_method(name), parse_method(f"{name}+closed-form")
    assert (plain.source, plain.recovery) == ("torch-pruning", None)
    assert (repaired.criterion, repaired.recovery) == (name, "closed-form")


def test_lists_and_repetitions():
    parsed = parse_methods(["default, random", "random,magnitude"])
    assert [method.name for method in parsed] == ["default", "random", "magnitude"]
    assert parse_methods("default, random,magnitude") == parsed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("magnitud", "unknown method 'magnitud'. Did you mean 'magnitude'"),
        ("torch-prunning", "unknown method 'torch-prunning'. Did you mean 'torch-pruning'"),
        ("random+close-form", "unknown allocation or recovery 'close-form'. Did you mean 'closed-"),
        ("random+magnitude", "unknown allocation or recovery 'magnitude'"),
        ("sensitivity+closed-form", "unknown method 'sensitivity'"),
        ("torch-pruning+closed", "unknown recovery 'closed'. Did you mean 'closed-form'"),
    ],
)
def test_unknown_parts_name_the_closest(name, message):
    with pytest.raises(UnknownNameError) as caught:
        parse_method(name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("random+uniform+sensitivity", "'sensitivity' is a second allocation"),
        ("random+none+closed-form", "'closed-form' is a second recovery"),
        ("torch-pruning+none+none", "torch-pruning takes one recovery"),
        ("torch-pruning+uniform", "torch-pruning has its own allocation"),
    ],
)
def test_contradictory_parts_are_refused(name, message):
    with pytest.raises(OptionError, match=message.replace("+", r"\+")):
        parse_method(name)


def test_empty_list_is_refused():
    with pytest.raises(OptionError, match="--methods names none"):
        parse_methods([" , "])


def test_default_is_not_a_registered_name():
    taken = {*CRITERIA.names(), *TORCH_PRUNING_METHODS}
    assert module.DEFAULT not in taken
