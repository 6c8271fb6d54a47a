"""build_info() and `python -m embed_ext`."""

from __future__ import annotations

import dataclasses
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import embed_ext
from embed_ext import _C, Embedding
from embed_ext.__main__ import main
from embed_ext._info import OPS, self_check
from tests.common import index_check_is


def test_build_info_describes_this_build() -> None:
    info = embed_ext.build_info()
    config = _C.build_config()
    assert info.version == embed_ext.__version__
    assert info.torch == torch.__version__
    assert info.built_with_torch == config["torch"]
    assert info.compiler == config["compiler"] != ""
    assert info.cpu_capability in ("portable", "avx2", "avx512")
    assert info.cuda_archs == config["cuda_archs"]
    assert (info.cuda_archs is None) == info.cuda.startswith("none: ")


def test_extension_is_compiled_as_a_standard_that_torch_takes() -> None:
    assert _C.build_config()["cxx_standard"] >= 2017


def test_build_info_lists_every_op_of_the_namespace() -> None:
    ops = embed_ext.build_info().ops
    schemas = torch._C._jit_get_all_schemas()
    registered = {schema.name for schema in schemas if schema.name.startswith("embed_ext::")}
    assert {f"embed_ext::{name}" for name in ops} == registered
    assert tuple(ops) == OPS


@pytest.mark.parametrize("op", OPS)
def test_build_info_lists_the_devices_of_each_op(op: str) -> None:
    info = embed_ext.build_info()
    with_cuda = info.cuda_archs is not None
    assert info.ops[op] == (("CPU", "CUDA", "Meta") if with_cuda else ("CPU", "Meta"))


def test_report_names_every_fact() -> None:
    info = embed_ext.build_info()
    report = str(info)
    facts: list[Any] = list(dataclasses.asdict(info).values())
    for fact in (*facts[:5], info.cuda, *info.ops):
        assert str(fact) in report


def test_command_line_says_ok() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "embed_ext"],
        cwd=Path(embed_ext.__file__).resolve().parents[1],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert str(embed_ext.build_info()) in result.stdout
    assert result.stdout.splitlines()[-1].startswith("self-check: ok (cpu")


def test_self_check_finds_nothing_wrong(device: str) -> None:
    assert self_check(device) == []


def wrong_forward(self: Embedding, input: Tensor) -> Tensor:
    return self.weight[input] + 1


def wrong_backward(self: Embedding, input: Tensor) -> Tensor:
    out = self.weight[input]
    return 2 * out - out.detach()


def no_backward(self: Embedding, input: Tensor) -> Tensor:
    return self.weight.detach()[input].requires_grad_()


@pytest.mark.parametrize(
    ("forward", "name"),
    [(wrong_forward, "forward"), (wrong_backward, "backward"), (no_backward, "backward")],
)
def test_self_check_says_what_differs(
    forward: Any, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Embedding, "forward", forward)
    # Row 3 is the padding row, which these forwards know nothing of.
    problems = self_check("cpu")
    assert f"cpu {name} differs from nn.Embedding's" in problems
    assert main() == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "self-check: " + "; ".join(problems)


def test_exit_status_is_that_of_the_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Embedding, "forward", wrong_forward)
    monkeypatch.delitem(sys.modules, "embed_ext.__main__")
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("embed_ext", run_name="__main__")
    assert caught.value.code == 1


@pytest.mark.parametrize("mode", ["lazy", "sync", "none"])
def test_index_check_mode_can_be_set(mode: Any) -> None:
    with index_check_is(mode):
        assert embed_ext.index_check() == mode
        with pytest.raises(IndexError):  # on the CPU, whatever the mode
            Embedding(3, 2)(torch.tensor([3]))
        embed_ext.check_indices()


def test_unknown_index_check_mode_is_refused() -> None:
    previous = embed_ext.index_check()
    with pytest.raises(ValueError, match="expected 'lazy', 'sync' or 'none', but got 'eager'"):
        embed_ext.set_index_check("eager")  # type: ignore[arg-type]
    assert embed_ext.index_check() == previous
