"""Build the package for the emulated device, in build/emulated.

    python tests/emulator/build.py [JOBS]

    build/emulated/libemulator.so     the device
    build/emulated/sm_90/embed_ext    the package; its CUDA kernels serve CPU tensors
    build/emulated/sm_90/tests        a copy of the tests, since Python finds both in one folder
    build/emulated/sm_90/benchmarks   and of the benchmarks, for benchmarks.counts
    build/emulated/sm_80              the same, with the code paths of that architecture
    build/emulated/kernels.so         the small kernels of kernels/, on which the device is tested

Needs g++ on x86-64 Linux, a torch of any kind, ninja, and the headers of a CUDA toolkit.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "emulator"
OUT = ROOT / "build" / "emulated"
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from cuda_home import require_cuda_home  # noqa: E402
from source_tree import mirror  # noqa: E402

from setup import read_version  # noqa: E402

ARCHS = (80, 90)
# The compiler may neither join accesses nor make vectors of them: what a kernel says is one access
# has to stay one.
DEVICE_FLAGS = """-O2 -fsanitize=thread --param=tsan-instrument-func-entry-exit=0
    --param=tsan-distinguish-volatile=1 -fno-store-merging -fno-tree-vectorize -include device.h"""


def registers_kernels(path: Path) -> bool:
    """Whether a file of csrc/cpu says which kernels serve CPU tensors: here others do."""
    return re.search(r"TORCH_LIBRARY_IMPL|= register_", path.read_text()) is not None


class Plan:
    """The text of build.ninja, as it grows."""

    def __init__(self, torch_folder: Path, torch_version: str, cuda_home: Path) -> None:
        includes = [torch_folder / "include", torch_folder / "include/torch/csrc/api/include"]
        includes += [Path(sysconfig.get_paths()["include"]), cuda_home / "include"]
        defines = {
            "TORCH_EXTENSION_NAME": "_C",
            "TORCH_API_INCLUDE_EXTENSION_H": "",
            "EMBED_EXT_WITH_CUDA": "",
            "EMBED_EXT_CUDA_ARCHS": '"emulated"',
            "EMBED_EXT_VERSION": f'"{read_version()}"',
            "EMBED_EXT_BUILD_TORCH_VERSION": f'"{torch_version}"',
        }
        common = "-std=c++20 -fPIC -g1 -fopenmp -w"
        common += "".join(f" '-D{name}={value}'" for name, value in defines.items())
        common += f" -I{HERE}/shims -I{HERE} -iquote {ROOT}/csrc/cuda"
        common += "".join(f" -isystem {folder}" for folder in includes)
        libraries = f"-L{torch_folder}/lib -ltorch_python -ltorch -ltorch_cpu -lc10"
        compiled = "-MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
        device = " ".join(DEVICE_FLAGS.split())
        translate = f"{sys.executable} {HERE}/translate.py $in $out"
        self.device_objects: set[Path] = set()
        self.lines = [
            f"rule host\n  command = g++ {common} -fvisibility=hidden -O1 {compiled}",
            f"rule device\n  command = g++ {common} -fvisibility=hidden {device} $arch {compiled}",
            f"rule emulator\n  command = g++ {common} -O2 {compiled}",
            f"rule translate\n  command = {translate}\n  restat = 1",
            f"rule link\n  command = g++ -shared -fopenmp $in {libraries} "
            f"-Wl,-rpath,{torch_folder}/lib:{OUT} -o $out",
        ]

    def build(self, rule: str, target: Path, sources: Sequence[Path], more: str = "") -> Path:
        self.lines.append(f"build {target}: {rule} {' '.join(map(str, sources))} {more}".rstrip())
        return target

    def objects(self, rule: str, sources: Sequence[Path]) -> list[Path]:
        names = ["_".join(path.relative_to(ROOT).with_suffix(".o").parts) for path in sources]
        pairs = zip(names, sources, strict=True)
        return [self.build(rule, OUT / "objects" / name, [source]) for name, source in pairs]

    def translated(self, folder: Path, name: str) -> tuple[list[Path], list[Path]]:
        """What translating each file of a folder makes: the sources, and the headers."""
        sources, headers = [], []
        for path in sorted(folder.iterdir()):
            target = OUT / name / path.name
            if path.suffix == ".cu":
                target = target.with_suffix(".cpp")
            kind = sources if path.suffix == ".cu" else headers
            kind.append(self.build("translate", target, [path], f"| {HERE}/translate.py"))
        return sources, headers

    def device_object(self, source: Path, headers: Sequence[Path], arch: int) -> Path:
        target = OUT / "objects" / f"{source.parent.name}_{source.stem}_{arch}.o"
        if target not in self.device_objects:
            self.device_objects.add(target)
            self.build("device", target, [source], "|| " + " ".join(map(str, headers)))
            self.lines.append(f"  arch = -DEMULATED_ARCH={arch}0")
        return target


def write_plan() -> None:
    import torch

    plan = Plan(Path(torch.__file__).parent, torch.__version__, require_cuda_home())
    emulator = plan.build(
        "link", OUT / "libemulator.so", plan.objects("emulator", sorted(HERE.glob("*.cpp")))
    )
    shared = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/autograd/*.cpp")]
    shared += [path for path in ROOT.glob("csrc/cpu/*.cpp") if not registers_kernels(path)]
    host = plan.objects("host", sorted(shared))
    sources, headers = plan.translated(ROOT / "csrc" / "cuda", "cuda")
    for arch in ARCHS:
        device = []
        for source in sources:
            # Only those that ask for the architecture are compiled for each.
            text = (ROOT / "csrc" / "cuda" / source.name).with_suffix(".cu").read_text()
            own = arch if "__CUDA_ARCH__" in text else ARCHS[-1]
            device.append(plan.device_object(source, headers, own))
        target = OUT / f"sm_{arch}" / "embed_ext" / "_C.so"
        plan.build("link", target, [*host, *device, emulator])
    sources, headers = plan.translated(HERE / "kernels", "kernels")
    kernels = [plan.device_object(source, headers, ARCHS[-1]) for source in sources]
    plan.build("link", OUT / "kernels.so", [*kernels, emulator])
    text = "\n".join(plan.lines) + "\n"
    ninja = OUT / "build.ninja"
    if not ninja.exists() or ninja.read_text() != text:
        ninja.write_text(text)


def copy_packages() -> None:
    """Copies, not links: a test that starts another Python finds the package beside itself."""
    for arch in ARCHS:
        folder = OUT / f"sm_{arch}"
        for name in ("benchmarks", "embed_ext", "tests", "tools"):
            mirror(ROOT / name, folder / name)
        shutil.copy(ROOT / "pyproject.toml", folder)


def main() -> None:
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        sys.exit("The emulated device switches stacks in x86-64 assembly, on Linux.")
    OUT.mkdir(parents=True, exist_ok=True)
    copy_packages()
    write_plan()
    jobs = sys.argv[1] if len(sys.argv) > 1 else "2"
    sys.exit(subprocess.call(["ninja", "-C", str(OUT), "-j", jobs, "--quiet"]))


if __name__ == "__main__":
    main()
