"""What the kernels must consist of once compiled: the table, and how it is held against SASS.

Vectors of 16 bytes, loads under way side by side and reductions without an answer are what the
kernels are fast by, and a compiler drops each of them without a word. nvdisasm shows them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

PACKAGE = "nvidia-cuda-nvdisasm"
LABEL = "label"  # in place of an opcode: other instructions jump to here


@dataclass(frozen=True)
class Instruction:
    """Such as ``LDG.E.128.CONSTANT`` and ``R4, desc[UR4][R2.64]``; the predicate is left out."""

    opcode: str
    operands: str = ""


Code = list[Instruction]


@dataclass(frozen=True)
class Expectation:
    """What holds of every kernel whose readable name matches, on a range of architectures."""

    kernels: str  # regular expression, from the start of a signature()
    opcode: str  # regular expression, from the start of an opcode
    least: int = 0
    most: int | None = None
    in_flight: int = 0  # of these loads, before the first result is needed
    since: int = 0  # sm_90 is 90
    before: int = 1000
    method: str = ""  # regular expression, of an optimizer's in the kernel's arguments

    def applies(self, name: str, arch: str) -> bool:
        number = int(re.sub(r"\D", "", arch))
        fits = re.match(self.kernels, signature(name)) is not None
        fits = fits and re.search(rf"(?:{self.method})", name) is not None
        return fits and self.since <= number < self.before

    def problem(self, code: Code) -> str | None:
        """What is wrong, or None."""
        count = sum(re.match(self.opcode, instruction.opcode) is not None for instruction in code)
        if count < self.least:
            return f"{count} of {self.opcode}, expected at least {self.least}"
        if self.most is not None and count > self.most:
            return f"{count} of {self.opcode}, expected at most {self.most}"
        if self.in_flight and (batch := most_in_flight(code, self.opcode)) < self.in_flight:
            return f"{batch} of {self.opcode} under way at once, expected {self.in_flight}"
        return None


OURS = r"(?!cub::)"
LOADS_16 = r" (floatx4|doublex2|__halfx8|__nv_bfloat16x8)\b"  # what a lane reads at a time
GATHER_16 = r"gather_(short|long)_rows uint4\b"
SCATTER_16 = r"scatter_add floatx4\b"
SCATTER_FLOATS = r"scatter_add \w+ floatx"
SEGMENTS_16 = "sum_tokens" + LOADS_16
FINISH_16 = "finish_rows" + LOADS_16
UPDATE_16 = "update_rows" + LOADS_16
UPDATE_8 = r"update_rows (__half|__nv_bfloat16)x4"  # beside 16 bytes of a state
LOAD_16 = r"LDG\.E\.128\.CONSTANT"
ANY_LOAD_16 = r"LDG\.E\.128"
STORE_16 = r"STG\.E\.128"

EXPECTATIONS = (
    Expectation(OURS, r"LDL|STL", most=0),
    # IndexErrors::report() takes its slot with the one compare-and-swap. More would be the loop
    # that the compiler makes of an atomic that the hardware lacks.
    Expectation(OURS, r"ATOMG?\.", most=1),
    Expectation(OURS, r"ATOMG?\.(?!E\.CAS\.)", most=0),
    Expectation(r"(sum_tokens|finish_rows|clear_vectors|renorm_rows)", r"ATOM|REDG?\.", most=0),
    # Forward: four loads, then four stores.
    Expectation(GATHER_16, LOAD_16, least=4, in_flight=4),
    Expectation(GATHER_16, STORE_16, least=4),
    # Backward by atomic adds: four loads, then reductions as wide as the hardware has them. Where
    # it has none of vectors, a lane's columns are apart, and its loads are as narrow as its adds.
    Expectation(SCATTER_16, LOAD_16, least=4, in_flight=4, since=90),
    Expectation(SCATTER_16, r"LDG\.E\.CONSTANT", least=16, in_flight=16, before=90),
    Expectation(SCATTER_FLOATS + "4", r"REDG\.E\.ADD\.F32x4\.", least=1, since=90),
    Expectation(SCATTER_FLOATS + "4", r"REDG?\.E\.ADD\.F32\.", most=0, since=90),
    Expectation(SCATTER_FLOATS + "2", r"REDG\.E\.ADD\.F32x2\.", least=1, since=90),
    Expectation(SCATTER_FLOATS + "4", r"RED\.E\.ADD\.F32\.", least=4, before=90),
    # Of doubles the compiler holds the last back, two or three as the architecture is.
    Expectation(r"scatter_add \w+ doublex2", r"LDG\.E\.64\.CONSTANT", least=8, in_flight=5),
    Expectation(r"scatter_add \w+ doublex2", r"REDG?\.E\.ADD\.F64\.", least=2),
    # Backward in order.
    Expectation(SEGMENTS_16, LOAD_16, least=4, in_flight=4),
    Expectation(SEGMENTS_16, STORE_16, least=1),
    Expectation(FINISH_16, LOAD_16, least=4, in_flight=4),
    # Four that clear, and the row.
    Expectation(FINISH_16, STORE_16, least=5),
    # Updates of rows: all that an element becomes is made of is on its way at once.
    Expectation(UPDATE_16, ANY_LOAD_16, least=2, in_flight=2),
    Expectation(
        UPDATE_16, ANY_LOAD_16, in_flight=3, method=r"\b(MomentumSgd|Adagrad|RowwiseAdam)<"
    ),
    Expectation(UPDATE_16, ANY_LOAD_16, in_flight=4, method=r"\bAdam<"),
    Expectation(UPDATE_16, STORE_16, least=1),
    Expectation(UPDATE_16, STORE_16, least=3, method=r"\bAdam<"),
    Expectation(UPDATE_8, r"LDG\.E\.64", least=2, in_flight=2),
    Expectation(UPDATE_8, ANY_LOAD_16, least=2, in_flight=2, method=r"\bAdam<"),
    # A kept gradient's rows.
    Expectation(r"clear_vectors uint4\b", STORE_16, least=1, most=1),
)


def signature(name: str) -> str:
    """What a kernel's template arguments mean, in whatever order it has them.

    That is, the types that are read and written, and how many at a time: for
    ``sum_tokens<ColumnsTag<8, 1>, __nv_bfloat16, float>``, ``sum_tokens __nv_bfloat16x8 floatx8``.
    """
    kernel, _, arguments = name.partition("<")
    types = re.findall(r"\b(?:float|double|__half|__nv_bfloat16|uint\w*)\b", arguments) or [""]
    count = re.search(r"\b\d+\b", arguments)
    times = f"x{count.group()}" if count else ""
    return f"{kernel} {types[0]}{times} {types[-1]}{times}"


def find_nvdisasm(cuda_home: Path) -> Path | None:
    """The toolkit's nvdisasm, else the one on PATH, else the one of the pip package."""
    if (cuda_home / "bin" / "nvdisasm").exists():
        return cuda_home / "bin" / "nvdisasm"
    if found := shutil.which("nvdisasm"):
        return Path(found)
    try:
        files = metadata.distribution(PACKAGE).files or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == "nvdisasm"), None)


def disassemble(nvdisasm: Path, cubin: Path) -> tuple[str, dict[str, Code]]:
    """The architecture of a cubin, such as 90, and its functions by mangled name."""
    command = [str(nvdisasm), "--print-code", str(cubin)]
    return parse(subprocess.check_output(command, text=True))


def parse(text: str) -> tuple[str, dict[str, Code]]:
    """Read nvdisasm's output: the architecture, and the functions by mangled name."""
    target = re.search(r"^\s*\.target\s+sm_(\w+)", text, re.MULTILINE)
    if target is None:
        raise ValueError("expected a line .target sm_NN in nvdisasm's output")
    functions: dict[str, Code] = {}
    code: Code = []
    for line in text.splitlines():
        if section := re.match(r"\s*\.section\s+(\.text\.)?([^,\s]+)", line):
            is_code, name = section.groups()
            code = functions.setdefault(name, []) if is_code else []
        elif re.match(r"\.L\w*:", line):
            code.append(Instruction(LABEL))
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+ +)?([A-Z][\w.]*) *([^;]*);", line):
            code.append(Instruction(found.group(1), found.group(2).strip()))
    return target.group(1), functions


def most_in_flight(code: Code, opcode: str) -> int:
    """The most loads of a kind that are under way at once: issued, and no result used so far.

    Counted within stretches that nothing jumps into, so that it is right on every path.
    """
    pending: list[set[int]] = []  # the registers that each load will fill
    most = 0
    for instruction in code:
        if instruction.opcode == LABEL:
            pending = []
            continue
        used = {int(number) for number in re.findall(r"\bR(\d+)", instruction.operands)}
        pending = [registers for registers in pending if not registers & used]
        if re.match(opcode, instruction.opcode):
            target = re.match(r"R(\d+)", instruction.operands)
            first = int(target.group(1)) if target else 0
            width = next((w for w in (128, 64) if f".{w}" in instruction.opcode), 32) // 32
            pending.append(set(range(first, first + width)))
            most = max(most, len(pending))
    return most


@dataclass
class Verdict:
    """What became of the expectations."""

    kernels: int
    checked: int  # pairs of a kernel and an expectation
    problems: list[str]
    unused: list[Expectation]  # of which no kernel is known


def check(
    functions: Mapping[tuple[str, str], Code],
    names: Mapping[str, str],
    expectations: Iterable[Expectation] = EXPECTATIONS,
) -> Verdict:
    """Hold functions, by mangled name and architecture, against expectations of readable names."""
    verdict = Verdict(len(functions), 0, [], [])
    for expectation in expectations:
        applicable = [key for key in functions if expectation.applies(names[key[0]], key[1])]
        if not applicable:
            verdict.unused.append(expectation)
        for name, arch in applicable:
            verdict.checked += 1
            if problem := expectation.problem(functions[name, arch]):
                verdict.problems.append(f"{names[name]} on sm_{arch}: {problem}")
    return verdict
