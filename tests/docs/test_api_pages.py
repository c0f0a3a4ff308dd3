"""Check that every public name is on the API page, with a docstring."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import ovsprune
from ovsprune.core import errors

DOCS = Path(__file__).parents[2] / "docs"
DOCUMENTED = set(re.findall(r"^::: ([\w.]+)$", (DOCS / "api.md").read_text("utf-8"), re.MULTILINE))
PUBLIC = [name for name in ovsprune.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_is_on_the_api_page(name: str) -> None:
    assert f"ovsprune.{name}" in DOCUMENTED


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(getattr(ovsprune, name))


@pytest.mark.parametrize("name", [n for n in PUBLIC if n.islower()])
def test_arguments_and_errors_are_described(name: str) -> None:
    function = getattr(ovsprune, name)
    assert inspect.isfunction(function)
    text = inspect.getdoc(function) or ""
    assert "Raises:" in text
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"\b{parameter}\b", text), f"{name}: {parameter} is not described"


@pytest.mark.parametrize("name", errors.__all__)
def test_error_is_described(name: str) -> None:
    page = (DOCS / "errors.md").read_text("utf-8")
    assert "::: ovsprune.core.errors" in page
    assert name in page and getattr(errors, name).__doc__


def test_every_page_is_in_the_navigation() -> None:
    nav = (DOCS.parent / "mkdocs.yml").read_text("utf-8")
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert pages and [page for page in pages if page not in nav] == []
