"""Compile every CUDA file for every architecture, on a machine that needs no GPU and no CUDA torch.

    python tools/check_cuda.py               # all of csrc/cuda
    python tools/check_cuda.py csrc/cuda/embedding.cu --archs 90

Prints what each kernel takes (registers, shared memory, stack, spills). Fails if a file does not
compile, if a kernel spills registers, if a launch is not followed by its check, or if the compiled
code is not what disassembly.py expects.
"""

from __future__ import annotations

import argparse
import inspect
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import disassembly
import torch
from cuda_home import require_cuda_home
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]
ARCHS = ("80", "90", "100")
PARALLEL_COMPILES = 2
# Read once: run_path() is not for several threads.
NVCC_FLAGS: list[str] = runpy.run_path(str(ROOT / "setup.py"))["NVCC_FLAGS"]
LAUNCH_CHECK = "C10_CUDA_KERNEL_LAUNCH_CHECK()"
LINES_TO_LAUNCH_CHECK = 12


@dataclass
class Usage:
    """What ptxas reports of one kernel on one architecture; sizes in bytes."""

    registers: int = 0
    shared: int = 0
    stack: int = 0
    spilled: int = 0


@dataclass
class Compiled:
    """The outcome of one file: usage and code by (mangled function name, arch)."""

    path: Path
    seconds: float
    failure: str
    usage: dict[tuple[str, str], Usage]
    code: dict[tuple[str, str], disassembly.Code]


def nvcc_command(nvcc: Path, path: Path, archs: list[str], output: str) -> list[str]:
    """The command setup.py would run, made to work with a CPU torch's headers too."""
    # Torch's own source knows which standard its headers need.
    standard = "c++20" if "c++20" in inspect.getsource(cpp_extension) else "c++17"
    command = [str(nvcc), f"-std={standard}", *cpp_extension.COMMON_NVCC_FLAGS, *NVCC_FLAGS]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    for folder in cpp_extension.include_paths():
        command += ["-isystem", folder]
    if torch.version.cuda is None:
        # A CPU torch lacks the header that CUDA builds of torch generate.
        command += ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    command += ["-DEMBED_EXT_WITH_CUDA", "-Xcompiler=-fPIC", "-Xptxas=-v"]
    return [*command, "-c", str(path), "-o", output]


def parse_usage(log: str) -> dict[tuple[str, str], Usage]:
    """Read ``ptxas -v``: "Compiling ... for arch", "Function properties for", then the figures."""
    usage: dict[tuple[str, str], Usage] = {}
    arch, function = "", ""
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", line):
            function, arch = match.groups()
        elif match := re.search(r"Function properties for (\S+)", line):
            function = match.group(1)
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            entry = usage.setdefault((function, arch), Usage())
            entry.stack = int(match.group(1))
            entry.spilled = int(match.group(2)) + int(match.group(3))
        elif match := re.search(r"Used (\d+) registers", line):
            entry = usage.setdefault((function, arch), Usage())
            entry.registers = int(match.group(1))
            shared = re.search(r"(\d+) bytes smem", line)
            entry.shared = int(shared.group(1)) if shared else 0
    return usage


def compile_file(nvcc: Path, nvdisasm: Path, path: Path, archs: list[str]) -> Compiled:
    """Compile one file for all architectures; keep what ptxas said, and the instructions."""
    start = time.monotonic()
    code: dict[tuple[str, str], disassembly.Code] = {}
    with tempfile.TemporaryDirectory() as folder:
        command = nvcc_command(nvcc, path, archs, f"{folder}/out.o")
        command += ["--keep", "--keep-dir", folder]  # among much else, the cubin of each
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        for cubin in Path(folder).glob("*.cubin"):
            arch, functions = disassembly.disassemble(nvdisasm, cubin)
            code.update({(name, arch): body for name, body in functions.items()})
    log = done.stdout + done.stderr
    failure = f"$ {' '.join(command)}\n{log}" if done.returncode else ""
    return Compiled(path, time.monotonic() - start, failure, parse_usage(log), code)


def compile_all(nvcc: Path, nvdisasm: Path, files: list[Path], archs: list[str]) -> list[Compiled]:
    """Compile the files, some at a time, and say so as each is done; return them by name."""
    results = []
    # The largest first, so that no long compile starts last and runs alone.
    files = sorted(files, key=lambda path: -path.stat().st_size)
    with ThreadPoolExecutor(PARALLEL_COMPILES) as pool:
        pending = [pool.submit(compile_file, nvcc, nvdisasm, path, archs) for path in files]
        for number, done in enumerate(as_completed(pending), start=1):
            result = done.result()
            kernels = len({name for name, _ in result.usage})
            verdict = "FAILED" if result.failure else f"{kernels} kernels"
            print(
                f"[{number}/{len(files)}] {result.path.name}: {verdict} ({result.seconds:.0f} s)",
                flush=True,
            )
            results.append(result)
    return sorted(results, key=lambda result: result.path)


def without_comments(text: str) -> str:
    """Blank out comments, keeping the line numbers."""
    return re.sub(
        r"//[^\n]*|/\*.*?\*/", lambda match: re.sub(r"[^\n]", " ", match.group()), text, flags=re.S
    )


def unchecked_launches(path: Path) -> list[str]:
    """Return a line for every kernel launch that no launch check follows.

    One check may serve the branches of an if; it does not serve two launches in a row.
    """
    text = without_comments(path.read_text())
    found = []
    for launch in re.finditer("<<<", text):
        end = text.find(";", text.find(">>>", launch.start()))
        after = "\n".join(text[end:].split("\n")[: LINES_TO_LAUNCH_CHECK + 1])
        before_check, check, _ = after.partition(LAUNCH_CHECK)
        if not check or "<<<" in before_check.split("else", 1)[0]:
            line = text.count("\n", 0, launch.start()) + 1
            found.append(f"{path.relative_to(ROOT)}:{line}: launch without {LAUNCH_CHECK}")
    return found


def demangle(names: list[str]) -> dict[str, str]:
    """Return the readable name of each mangled one, without what is common to all."""
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    lines = subprocess.check_output([tool], input="\n".join(names), text=True).splitlines()
    readable = {}
    for name, text in zip(names, lines, strict=True):
        text = text.replace("(anonymous namespace)::", "").removeprefix("void ")
        text = re.sub(r"\bembed_ext::(cuda::)?", "", text)
        depth, end = 0, len(text)
        for position, letter in enumerate(text):
            depth += {"<": 1, ">": -1}.get(letter, 0)
            if letter == "(" and depth == 0:
                end = position
                break
        readable[name] = text[:end]
    return readable


def print_table(result: Compiled, archs: list[str]) -> None:
    """One row a kernel: registers on each architecture, then the worst of the other figures."""
    functions = sorted({function for function, _ in result.usage})
    names = demangle(functions)
    width = max(40, shutil.get_terminal_size().columns - 9 * len(archs) - 30)
    heading = "".join(f"{'sm_' + arch:>9}" for arch in archs)
    heading += "".join(f"{title:>9}" for title in ("smem", "stack", "spill"))
    print(f"\n{str(result.path.relative_to(ROOT)):<{width}}{heading}")
    for function in sorted(functions, key=lambda function: names[function]):
        rows = [result.usage.get((function, arch), Usage()) for arch in archs]
        name = names[function]
        if len(name) > width - 4:
            name = name[: width - 7] + "..."
        registers = "".join(f"{row.registers or '-':>9}" for row in rows)
        worst = [max(row.shared for row in rows), max(row.stack for row in rows)]
        worst.append(max(row.spilled for row in rows))
        print(f"  {name:<{width - 2}}{registers}" + "".join(f"{value:>9}" for value in worst))


def check_code(results: list[Compiled], is_whole: bool) -> list[str]:
    """Hold the compiled code against the expectations; return a line for each that fails.

    Those that fit no kernel fail too if ``is_whole``: if all was compiled.
    """
    code = {key: body for result in results for key, body in result.code.items()}
    kernels = {key for result in results for key, usage in result.usage.items() if usage.registers}
    names = demangle(sorted({name for name, _ in code}))
    problems = [
        f"{name} on sm_{arch}: not in the disassembly" for name, arch in kernels - code.keys()
    ]
    verdict = disassembly.check(code, names)
    problems += verdict.problems
    if is_whole:
        problems += [f"no kernel fits {expectation}" for expectation in verdict.unused]
    print(
        f"\ndisassembly: {verdict.kernels} compiled kernels, {verdict.checked} expectations, "
        f"{len(problems)} not met"
    )
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: every .cu in csrc/cuda")
    parser.add_argument("--archs", nargs="+", default=list(ARCHS), help="default: %(default)s")
    options = parser.parse_args()

    cuda_home = require_cuda_home()
    nvdisasm = disassembly.find_nvdisasm(cuda_home)
    if nvdisasm is None:
        sys.exit(
            f"No nvdisasm found: pip install {disassembly.PACKAGE}, or the whole CUDA toolkit."
        )
    files = [path.resolve() for path in options.files] or sorted(ROOT.glob("csrc/cuda/*.cu"))
    if not files:
        sys.exit("No .cu file to check in csrc/cuda.")
    problems = []
    for path in [*files, *sorted(ROOT.glob("csrc/cuda/*.cuh"))]:
        problems += unchecked_launches(path)
    results = compile_all(cuda_home / "bin" / "nvcc", nvdisasm, files, options.archs)

    for result in results:
        name = result.path.relative_to(ROOT)
        if result.failure:
            print(f"\n{result.failure}")
            problems.append(f"{name}: does not compile")
            continue
        print_table(result, options.archs)
        for (function, arch), usage in result.usage.items():
            if usage.spilled:
                kernel = demangle([function])[function]
                problems.append(f"{name}: {kernel} spills {usage.spilled} bytes on sm_{arch}")
    is_whole = not options.files and set(ARCHS) <= set(options.archs)
    problems += check_code(results, is_whole)
    print(
        "\n"
        + "\n".join(
            problems or [f"{len(files)} files: all compile, checked, no spills, as expected."]
        )
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
