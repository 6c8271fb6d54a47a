"""tools/disassembly.py reads SASS rightly, and notices when a kernel is not what is expected; and
what the CPU kernels of this build consist of."""

from __future__ import annotations

import platform
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

from embed_ext import _C

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import disassembly  # noqa: E402
import fences  # noqa: E402
from disassembly import Expectation, Instruction, most_in_flight, parse  # noqa: E402

# What nvdisasm prints, cut down: two kernels that are as they should be.
SASS = """\
	.headerflags	@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS"
	.target	sm_90

//--------------------- .text.gather --------------------------
	.section	.text.gather,"ax",@progbits
	.align	128
        .type           gather,@function
gather:
.text.gather:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR8][R2.64] ;
        /*0020*/              @!P1 LDG.E.128.CONSTANT R8, desc[UR8][R2.64+0x200] ;
        /*0030*/                   IADD3 R24, P0, R24, 0x1, RZ ;
        /*0040*/             @!UP2 LDG.E.128.CONSTANT R12, desc[UR8][R2.64+0x400] ;
        /*0050*/                   LDG.E.128.CONSTANT R16, desc[UR8][R2.64+0x600] ;
        /*0060*/               @P0 BRA `(.L_x_1) ;
        /*0070*/                   STG.E.128 desc[UR8][R20.64], R4 ;
        /*0080*/                   STG.E.128 desc[UR8][R20.64+0x200], R8 ;
        /*0090*/                   STG.E.128 desc[UR8][R20.64+0x400], R12 ;
        /*00a0*/                   STG.E.128 desc[UR8][R20.64+0x600], R16 ;
.L_x_1:
        /*00b0*/                   EXIT ;
        /*00c0*/                   NOP;

	.section	.nv.info.gather,"",@"SHT_CUDA_INFO"
        /*0000*/        .byte   0x04, 0x2f
	.section	.text.scatter,"ax",@progbits
        /*0000*/                   LDG.E.128.CONSTANT R4, desc[UR8][R2.64] ;
        /*0010*/                   LDG.E.128.CONSTANT R8, desc[UR8][R2.64+0x200] ;
        /*0020*/                   LDG.E.128.CONSTANT R12, desc[UR8][R2.64+0x400] ;
        /*0030*/                   LDG.E.128.CONSTANT R16, desc[UR8][R2.64+0x600] ;
        /*0040*/                   REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR8][R20.64], R4 ;
        /*0050*/                   ATOMG.E.CAS.STRONG.GPU PT, R23, [R24], R22, R23 ;
        /*0060*/                   EXIT ;
"""
NAMES = {"gather": "gather_long_rows<uint4, long>", "scatter": "scatter_add<float, 4, long>"}


LOAD = r"LDG\.E\.128\.CONSTANT"


def verdict_of(text: str) -> disassembly.Verdict:
    """What the table says of the kernels in the text."""
    arch, functions = parse(text)
    return disassembly.check({(name, arch): code for name, code in functions.items()}, NAMES)


def test_functions_and_their_instructions_are_found() -> None:
    arch, functions = parse(SASS)
    assert arch == "90"
    assert {name: len(code) for name, code in functions.items()} == {"gather": 14, "scatter": 7}
    assert functions["gather"][1] == Instruction("LDG.E.128.CONSTANT", "R4, desc[UR8][R2.64]")
    assert functions["gather"][-3:] == [
        Instruction(disassembly.LABEL),
        Instruction("EXIT"),
        Instruction("NOP"),
    ]
    with pytest.raises(ValueError, match="sm_NN"):
        parse("nothing of the kind")


def test_kernels_as_expected_are_no_problem() -> None:
    verdict = verdict_of(SASS)
    assert (verdict.kernels, verdict.problems) == (2, [])
    assert verdict.checked > 8


@pytest.mark.parametrize(
    ("replaced", "by", "problem"),
    [
        # Loads of memory that may change, stores of 8 bytes, reductions of one float each.
        (".CONSTANT R12", " R12", f"3 of {LOAD}"),
        ("STG.E.128", "STG.E.64", r"0 of STG\.E\.128"),
        ("F32x4.FTZ", "F32.FTZ", r"0 of REDG\.E\.ADD\.F32x4\."),
        # A spill, an atomic that answers, and a second compare-and-swap.
        ("IADD3 R24,", "STL [R1+0x4], R24,", "1 of LDL|STL"),
        ("IADD3 R24,", "ATOM.E.ADD PT, R24, [R26],", r"1 of ATOMG?\.(?!E\.CAS\.)"),
        ("EXIT", "ATOMG.E.CAS.STRONG.GPU PT, R23, [R24], R22, R23", r"2 of ATOMG?\."),
        # The first result is used before the last load, and something jumps in between two loads.
        ("IADD3 R24, P0, R24, 0x1, RZ", "FADD R24, R24, R5", f"3 of {LOAD} under way"),
        (
            "        /*0030*/                   IADD3",
            ".L_x_7:\n  /*0030*/ IADD3",
            f"2 of {LOAD} under",
        ),
    ],
)
def test_a_kernel_that_changed_is_a_problem(replaced: str, by: str, problem: str) -> None:
    assert replaced in SASS
    problems = verdict_of(SASS.replace(replaced, by)).problems
    assert any(problem in line for line in problems), problems


def test_loads_are_counted_until_the_first_use_of_their_registers() -> None:
    def load(register: int) -> Instruction:
        return Instruction("LDG.E.64", f"R{register}, [R40.64]")

    apart = [load(2), Instruction("FADD", "R9, R3, R8"), load(4), Instruction("FADD", "R9, R4, R8")]
    assert most_in_flight(apart, r"LDG\.E\.64") == 1
    batched = [load(2), load(4), Instruction("FADD", "R9, R8, R8"), load(6)]
    assert most_in_flight(batched, r"LDG\.E\.64") == 3
    assert most_in_flight(batched, r"LDG\.E\.128") == 0


def test_an_expectation_holds_for_its_architectures_and_kernels() -> None:
    expectation = Expectation("scatter_add floatx4", "RED", least=1, since=90)
    assert expectation.applies("scatter_add<float, 4, long>", "90")
    assert expectation.applies("scatter_add<float, 4, int>", "100a")
    assert not expectation.applies("scatter_add<float, 4, long>", "80")
    assert not expectation.applies("other_scatter_add<float, 4, long>", "90")
    assert expectation in disassembly.check({}, {}, [expectation]).unused


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("sum_tokens<ColumnsTag<4, 1>, float, float>", True),
        ("sum_tokens<ColumnsTag<8, 1>, __nv_bfloat16, __nv_bfloat16>", True),
        ("sum_tokens<ColumnsTag<2, 1>, double, double>", True),
        ("sum_tokens<ColumnsTag<4, 1>, __nv_bfloat16, float>", False),
        ("sum_tokens<ColumnsTag<1, 4>, float, float>", False),
        ("finish_rows<ColumnsTag<4, 1>, float, float>", False),
        ("scatter_add<ColumnsTag<4, 1>, float, float, long>", False),
    ],
)
def test_names_tell_which_kernels_load_16_bytes(name: str, fits: bool) -> None:
    expectation = Expectation(disassembly.SEGMENTS_16, disassembly.LOAD_16, least=1)
    assert expectation.applies(name, "80") == fits


def test_an_optimizers_method_is_told_by_its_name() -> None:
    expectation = Expectation(disassembly.UPDATE_16, disassembly.LOAD_16, method=r"\bAdam<")
    for name, fits in {
        "update_rows<float, 4, Adam<float> >": True,
        "update_rows<float, 4, RowwiseAdam<float> >": False,
        "update_rows<float, 2, Adam<float> >": False,
    }.items():
        assert expectation.applies(name, "80") == fits


def test_a_signature_says_what_is_read_and_written() -> None:
    for name, meaning in {
        "sum_tokens<ColumnsTag<8, 1>, __nv_bfloat16, float>": "sum_tokens __nv_bfloat16x8 floatx8",
        "scatter_add<ColumnsTag<2, 1>, double, double, long>": "scatter_add doublex2 doublex2",
        "gather_long_rows<uint4, unsigned char>": "gather_long_rows uint4 uint4",
        "make_entries": "make_entries  ",
    }.items():
        assert disassembly.signature(name) == meaning


def test_the_disassembler_is_looked_for_in_the_toolkit_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(disassembly, "PACKAGE", "no-such-package")
    assert disassembly.find_nvdisasm(tmp_path) is None
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvdisasm").touch()
    assert disassembly.find_nvdisasm(tmp_path) == tmp_path / "bin" / "nvdisasm"


# What objdump prints, cut down.
OBJDUMP = """\
000000000007f610 <_ZN9embed_ext3cpu4avx210clear_rows>:
   7f610:\tvmovntdq %ymm0,(%rax)
   7f618:\tvmovntdqa (%rax),%ymm0
   7f620:\tsfence
0000000000080000 <_ZN9embed_ext3cpu8portable8sum_runs>:
   80000:\tmovntps %xmm0,(%rax)
   80008:\tret
0000000000090000 <_ZN9embed_ext3cpu6avx5129copy_rows>:
   90000:\tret
"""


def test_streamed_stores_and_fences_are_counted_in_each_function() -> None:
    assert fences.count_in(OBJDUMP) == {
        "_ZN9embed_ext3cpu4avx210clear_rows": fences.Streaming(stores=1, fences=1),
        "_ZN9embed_ext3cpu8portable8sum_runs": fences.Streaming(stores=1, fences=0),
    }


@pytest.mark.skipif(platform.machine() != "x86_64", reason="streamed stores are x86's")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="no objdump on PATH")
@pytest.mark.skipif(
    "clang" in _C.build_config()["compiler"].lower(), reason="made for what GCC inlines"
)
def test_every_streamed_store_is_followed_by_a_fence() -> None:
    """Of all orders in which memory shows them to other threads, no test of values sees the bad."""
    streaming = fences.count_in(fences.disassemble(Path(_C.__file__)))
    if not streaming:
        pytest.skip("this build has no symbols")
    assert [name for name, found in streaming.items() if found.fences == 0] == []
    kernels = Counter(
        (namespace, kernel)
        for name in streaming
        for namespace in ("portable", "avx2", "avx512")
        for kernel in ("gather_rows", "sum_runs", "clear_rows")
        if f"{len(namespace)}{namespace}" in name and kernel in name
    )
    # Two types of index; four dtypes whose rows can be copied as they are, and two of token.
    per_kernel = {"gather_rows": 2, "sum_runs": 8, "clear_rows": 1}
    assert kernels == {
        (namespace, kernel): count
        for namespace in ("portable", "avx2", "avx512")
        for kernel, count in per_kernel.items()
    }
