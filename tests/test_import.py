"""Importing the package: with the compiled part missing or unfit, with settings that are wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import pytest
import torch

import embed_ext
from embed_ext import _C, _library

PACKAGE = Path(embed_ext.__file__).resolve().parent
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
ADVICE = "pip install --no-build-isolation"

# What a lookup does not need and what takes long to load.
HEAVY = (
    "matplotlib",
    "pandas",
    "scipy",
    "sympy",
    "torch._dynamo",
    "torch._export",
    "torch._inductor",
    "torch.distributed.tensor",
    "torch.export",
    "torch.fx.experimental.symbolic_shapes",
    "torch.onnx",
    "torch.testing",
    "torch.utils.cpp_extension",
    "torch.utils.tensorboard",
    "torchvision",
)

# Loads torch, which takes long, once; forks for each piece of code and sends back its `result`.
SERVER = """
import json, os, sys, torch
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        names = {}
        try:
            exec(json.loads(line), names)
            answer = names.get("result")
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(1, (json.dumps(answer) + "\\n").encode())
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    if status:
        os.write(1, (json.dumps(f"died with status {status}") + "\\n").encode())
"""

Fresh = Callable[[str], Any]


@pytest.fixture(scope="module")
def fresh() -> Iterator[Fresh]:
    """Runs code in a new process with torch loaded and nothing else; returns its `result`."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:

        def run(code: str) -> Any:
            assert server.stdin is not None and server.stdout is not None
            server.stdin.write(json.dumps(code) + "\n")
            server.stdin.flush()
            return json.loads(server.stdout.readline())

        yield run


def import_error(fresh: Fresh, before: str) -> str:
    """The message of the ImportError that the first and the second import end with."""
    messages = fresh(
        f"""
import sys, torch
{before}
result = []
for _ in range(2):
    try:
        import embed_ext
    except ImportError as error:
        result.append(str(error))
"""
    )
    assert len(messages) == 2 and messages[0] == messages[1]
    return str(messages[0])


def assert_one_sentence(message: str) -> None:
    assert message.startswith("embed_ext")
    assert "\n" not in message and ". " not in message


@pytest.fixture
def uncompiled(tmp_path: Path) -> Path:
    """A folder with the package's Python files alone."""
    compiled = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "embed_ext", ignore=compiled)
    return tmp_path


def test_without_the_compiled_part(fresh: Fresh, uncompiled: Path) -> None:
    message = import_error(fresh, f"sys.path.insert(0, {str(uncompiled)!r})")
    assert "not compiled" in message and ADVICE in message
    assert_one_sentence(message)


def test_with_a_compiled_part_cut_short(fresh: Fresh, uncompiled: Path) -> None:
    (uncompiled / "embed_ext" / f"_C{EXTENSION_SUFFIXES[0]}").write_bytes(b"\x7fELF")
    message = import_error(fresh, f"sys.path.insert(0, {str(uncompiled)!r})")
    assert f"does not fit torch {torch.__version__}" in message and ADVICE in message
    assert_one_sentence(message)


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
def test_with_a_symbol_that_this_torch_lacks(fresh: Fresh, uncompiled: Path) -> None:
    assert COMPILER is not None
    source = uncompiled / "unfit.c"
    source.write_text(
        "void* gone_from_torch(void);\nvoid* PyInit__C(void) { return gone_from_torch(); }\n"
    )
    target = uncompiled / "embed_ext" / f"_C{EXTENSION_SUFFIXES[0]}"
    subprocess.run([COMPILER, "-shared", "-fPIC", source, "-o", target], check=True)
    message = import_error(fresh, f"sys.path.insert(0, {str(uncompiled)!r})")
    assert "gone_from_torch" in message
    assert f"does not fit torch {torch.__version__}" in message and ADVICE in message
    assert_one_sentence(message)


def test_with_another_torch(fresh: Fresh) -> None:
    message = import_error(fresh, "torch.__version__ = '99.0.1+cu130'")
    built_with = _C.build_config()["torch"]
    assert f"built with torch {built_with}, but torch 99.0.1+cu130 is installed" in message
    assert ADVICE in message
    assert_one_sentence(message)


@pytest.mark.parametrize("change", [-1, 1])
def test_with_the_release_of_torch_before_and_after(
    change: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    major, minor = map(int, torch.__version__.split(".")[:2])
    monkeypatch.setattr(torch, "__version__", f"{major}.{minor + change}.0")
    with pytest.raises(ImportError, match=f"but torch {major}.{minor + change}.0 is installed"):
        _library.load()


def test_another_patch_release_of_torch_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    major, minor = torch.__version__.split(".")[:2]
    monkeypatch.setattr(torch, "__version__", f"{major}.{minor}.99+cu130")
    _library.load()


def test_import_loads_nothing_heavy(fresh: Fresh) -> None:
    loaded = fresh(
        "import sys; before = set(sys.modules); import embed_ext; "
        "result = sorted(set(sys.modules) - before)"
    )
    assert "embed_ext._C" in loaded
    heavy = [name for name in loaded if any(name == h or name.startswith(h + ".") for h in HEAVY)]
    assert heavy == []


def test_import_changes_no_setting_of_torch(fresh: Fresh) -> None:
    before, after = fresh(
        """
import torch

def settings():
    return [
        torch.get_num_threads(),
        str(torch.get_default_dtype()),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_rng_state().tolist(),
    ]

result = [settings()]
import embed_ext
result.append(settings())
"""
    )
    assert before == after


def test_versions_agree() -> None:
    assert embed_ext.__version__ == _C.build_config()["version"]
    assert embed_ext.__version__ == embed_ext.build_info().version


@pytest.mark.parametrize("mode", ["lazy", "sync", "none", ""])
def test_index_check_comes_from_the_environment(mode: str, fresh: Fresh) -> None:
    setting = f"import os; os.environ['EMBED_EXT_INDEX_CHECK'] = {mode!r}"
    assert fresh(f"{setting}; import embed_ext; result = embed_ext.index_check()") == (
        mode or "lazy"
    )


@pytest.mark.parametrize(
    ("name", "choices", "code"),
    [
        ("EMBED_EXT_INDEX_CHECK", "lazy, sync or none", "embed_ext.index_check()"),
        (
            "EMBED_EXT_CPU_CAPABILITY",
            "portable, avx2 or avx512",
            "embed_ext.Embedding(3, 2)(torch.tensor([1]))",
        ),
        ("EMBED_EXT_CPU_CAPABILITY", "portable, avx2 or avx512", "embed_ext.build_info()"),
    ],
)
def test_wrong_setting_is_an_error_that_lists_the_right_ones(
    name: str, choices: str, code: str, fresh: Fresh
) -> None:
    error = fresh(f"import os; os.environ[{name!r}] = 'fast'; import embed_ext, torch; {code}")
    assert error == f"RuntimeError: {name}: expected {choices}, but got fast"


def test_cpu_capability_can_be_lowered(fresh: Fresh) -> None:
    result = fresh(
        """
import os
os.environ["EMBED_EXT_CPU_CAPABILITY"] = "portable"
import embed_ext, torch
table = embed_ext.Embedding(50, 33)
indices = torch.arange(200) % 50
equal = torch.equal(table(indices), table.weight[indices])
result = [embed_ext.build_info().cpu_capability, equal]
"""
    )
    assert result == ["portable", True]
