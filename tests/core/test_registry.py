"""Registries: registration of plug-ins, look-up, and errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ovsprune.core.errors import OvspruneError, UnknownNameError
from ovsprune.core.registry import Registry


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    package = tmp_path / "some_room"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from ovsprune.core.registry import Registry\nTHINGS = Registry('thing', 'some_room')\n"
    )
    (package / "first.py").write_text(
        "from some_room import THINGS\n\n"
        "@THINGS.register('first')\nclass First:\n    '''The first.\n\n    More.\n    '''\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "some_room"
    for name in [n for n in sys.modules if n.split(".")[0] == "some_room"]:
        del sys.modules[name]


def test_the_room_is_imported_on_first_look_up(room: str) -> None:
    module = __import__(room)
    assert "some_room.first" not in sys.modules
    assert module.THINGS.names() == ("first",)
    assert type(module.THINGS.get("first")).__name__ == "First"
    assert module.THINGS.summary("first") == "The first."


def test_a_second_use_of_a_name_is_refused(room: str) -> None:
    module = __import__(room)
    module.THINGS.names()
    with pytest.raises(
        ValueError, match=r"thing 'first' is registered already by some_room\.first"
    ):
        module.THINGS.register("first")(type("Other", (), {}))


def test_an_unknown_name_lists_the_known_and_the_closest(room: str) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown thing 'frist'.*Did you mean 'first'") as e:
        __import__(room).THINGS.get("frist")
    assert isinstance(e.value, OvspruneError)
    assert e.value.closest == ("first",)


def test_import_errors_of_a_plug_in_are_raised(room: str, tmp_path: Path) -> None:
    (tmp_path / room / "broken.py").write_text("import a_library_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_there"):
        __import__(room).THINGS.names()


def test_an_outside_package_adds_by_entry_point(monkeypatch: pytest.MonkeyPatch, room: str) -> None:
    module = __import__(room)

    class Entry:
        def load(self) -> None:
            module.THINGS.register("outside")(type("Outside", (), {"__doc__": "From outside."}))

    monkeypatch.setattr("ovsprune.core.registry.entry_points", lambda group: [Entry()])
    assert "outside" in module.THINGS.names()


def test_registries_do_not_share_entries() -> None:
    one, two = Registry("a", "ovsprune.core"), Registry("b", "ovsprune.core")
    one.register("x")(type("X", (), {}))
    assert "x" in one.names()
    assert "x" not in two.names()
