"""Every public name says what it does, with an example that runs; so do the README's."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import inspect
import io
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import embed_ext

README = Path(__file__).resolve().parents[1] / "README.md"
MODULES = [
    "embed_ext",
    *(
        module.name
        for module in pkgutil.walk_packages(embed_ext.__path__, "embed_ext.")
        if module.name not in ("embed_ext._C", "embed_ext.__main__")
        and (module.name != "embed_ext._sharding" or torch.distributed.is_available())
    ),
]


def public_names() -> dict[str, Any]:
    """The functions and classes that users are meant to call, by dotted name."""
    found = {}
    for module in (embed_ext, embed_ext.functional, embed_ext.optim, embed_ext.reference):
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isfunction(value) or inspect.isclass(value):
                found[f"{module.__name__}.{name}"] = value
    return found


PUBLIC = public_names()


def public_members(module_name: str) -> dict[str, Any]:
    """The functions and classes without a leading underscore that a module defines."""
    return {
        name: value
        for name, value in vars(importlib.import_module(module_name)).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module_name
    }


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_modules_and_what_they_define_have_docstrings(name: str) -> None:
    assert importlib.import_module(name).__doc__
    without = [member for member, value in public_members(name).items() if not value.__doc__]
    assert without == []


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_has_an_example(name: str) -> None:
    docstring = inspect.cleandoc(PUBLIC[name].__doc__)
    assert docstring.splitlines()[0].endswith((".", "``.", ":")), "no summary line"
    assert doctest.DocTestParser().get_examples(docstring)


def python_blocks(markdown: str) -> list[str]:
    """The contents of the ```python fences."""
    return re.findall(r"^```python\n(.*?)^```$", markdown, flags=re.DOTALL | re.MULTILINE)


def test_readme_examples_run_from_top_to_bottom() -> None:
    blocks = python_blocks(README.read_text())
    assert blocks
    names: dict[str, Any] = {"__name__": "readme"}
    for number, block in enumerate(blocks):
        if ">>>" in block:
            example = doctest.DocTestParser().get_doctest(
                block, names, f"README block {number}", str(README), 0
            )
            assert doctest.DocTestRunner().run(example, clear_globs=False).failed == 0
            names = example.globs
        else:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block, f"{README}:block {number}", "exec"), names)
