"""docs/: the examples run, and every test that a page names exists."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest

from tests.test_docstrings import python_blocks

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def names_of_tests(path: Path) -> set[str]:
    """The names of the test functions of a file, which is not imported."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def test_there_are_pages() -> None:
    assert PAGES


@each_page
def test_every_test_that_is_named_exists(page: Path) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text())
    missing = [f"{file}::{name}" for file, name in named if name not in names_of_tests(ROOT / file)]
    assert missing == []
    assert page.read_text().count("::test_") == len(named), "a name that is not in that form"


@each_page
def test_every_version_that_is_named_is_the_one_that_is_tested(page: Path) -> None:
    pinned = (ROOT / "pyproject.toml").read_text()
    named = re.findall(r"`([\w.-]+==[\w.]+)`", page.read_text())
    assert [version for version in named if f'"{version}' not in pinned] == []
    assert named or page.name != "libraries.md"


@each_page
def test_examples_run(page: Path) -> None:
    for number, block in enumerate(python_blocks(page.read_text())):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block, f"{page}:block {number}", "exec"), {"__name__": "docs"})


def test_the_report_that_is_shown_is_the_one_printed() -> None:
    text = (ROOT / "docs" / "swapping.md").read_text()
    (shown,) = re.findall(r"^prints\n\n```\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    printed = io.StringIO()
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(printed):
        exec(python_blocks(text)[0], names)
    assert printed.getvalue() == shown
