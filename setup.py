"""Builds ``embed_ext._C``; the metadata is in pyproject.toml.

Environment variables:
    EMBED_EXT_CUDA        0: leave it out, 1: insist on it. Unset: used if torch and a toolkit can.
    TORCH_CUDA_ARCH_LIST  GPU architectures to compile for, such as "9.0" or "8.0;9.0+PTX".
    EMBED_EXT_SANITIZE    "address,undefined" builds with these sanitizers.
    MAX_JOBS              how many files to compile at once.
"""

from __future__ import annotations

import ast
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setuptools import setup

if TYPE_CHECKING:
    from setuptools import Extension

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "8.0;9.0;10.0+PTX"
DEFAULT_ARCHS_BEFORE_CUDA_12_8 = "8.0;9.0+PTX"
# -g0 undoes the -g that most Pythons bring: it made the library ten times as large.
# A product and a sum are rounded apart, since not every instruction set can round them together.
CXX_FLAGS = ["-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
# -lineinfo lets profilers and compute-sanitizer name source lines; the kernels stay the same.
NVCC_FLAGS = ["-O3", "-lineinfo", "-Xcompiler=-fvisibility=hidden"]


@dataclass
class BuildSettings:
    """Everything that decides how the extension is compiled."""

    with_cuda: bool
    choice: str
    sources: list[str]
    headers: list[str]
    cxx_flags: list[str]
    nvcc_flags: list[str]
    link_flags: list[str]
    cuda_archs: str


def read_version() -> str:
    """Read the version without importing the package, which needs what is not yet built."""
    tree = ast.parse((ROOT / "embed_ext" / "_version.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__version__":
            return str(ast.literal_eval(node.value))
    raise SystemExit("embed_ext/_version.py: no line '__version__ = ...'")


def decide_cuda(torch_cuda: str | None, cuda_home: str | None) -> tuple[bool, str]:
    """Return whether to build the CUDA kernels, and why.

    A visible GPU plays no part: wheels are built on machines that have none.
    """
    wanted = os.environ.get("EMBED_EXT_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"EMBED_EXT_CUDA: expected 0 or 1, but got {wanted!r}")
    if wanted == "0":
        return False, "CPU only: EMBED_EXT_CUDA=0"
    missing = ""
    if not torch_cuda:
        missing = "this torch is built without CUDA"
    elif not cuda_home:
        missing = "no CUDA toolkit found: set CUDA_HOME to the folder above nvcc's bin"
    elif not (Path(cuda_home) / "include" / "cuda_runtime.h").exists():
        # An nvcc on PATH can be a script that calls the real one somewhere else.
        missing = f"CUDA_HOME={cuda_home} has no include/cuda_runtime.h"
        wanted = "1"
    if not missing:
        return True, f"CUDA {torch_cuda}, CUDA_HOME={cuda_home}"
    if wanted == "1":
        raise SystemExit(f"embed_ext: cannot build with CUDA: {missing}")
    return False, f"CPU only: {missing}"


def sanitizer_flags() -> list[str]:
    """Flags for the compiler and the linker, from EMBED_EXT_SANITIZE."""
    names = os.environ.get("EMBED_EXT_SANITIZE", "")
    if not names:
        return []
    # vptr checks need the type information of torch's classes, which its libraries do not export.
    return [
        f"-fsanitize={names}",
        "-fno-sanitize=vptr",
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
        # Instrumented code takes many times as long to compile at -O3; reports need lines only.
        "-O1",
        "-g1",
    ]


def openmp_flags() -> tuple[list[str], list[str]]:
    """Compile and link flags; without them ``at::parallel_for`` runs on one thread, silently."""
    if sys.platform != "darwin":
        return ["-fopenmp"], ["-fopenmp"]
    # Apple's clang has no OpenMP library of its own: use the one that torch ships.
    return ["-Xpreprocessor", "-fopenmp"], ["-lomp"]


def find_files(with_cuda: bool) -> tuple[list[str], list[str]]:
    """Sources and headers, as paths relative to the root, which setuptools asks for."""
    sources = [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/autograd/*.cpp")]
    sources += ROOT.glob("csrc/cpu/*.cpp")
    if with_cuda:
        sources += ROOT.glob("csrc/cuda/*.cu")
    headers = [path for path in ROOT.glob("csrc/**/*") if path.suffix in (".h", ".cuh", ".inl")]
    return (
        sorted(str(path.relative_to(ROOT)) for path in sources),
        sorted(str(path.relative_to(ROOT)) for path in headers),
    )


def build_settings() -> BuildSettings:
    """Collect all build settings in one place."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    with_cuda, choice = decide_cuda(torch.version.cuda, CUDA_HOME)
    cuda_archs = ""
    if with_cuda:
        new_enough = tuple(map(int, str(torch.version.cuda).split(".")[:2])) >= (12, 8)
        default_archs = DEFAULT_ARCHS if new_enough else DEFAULT_ARCHS_BEFORE_CUDA_12_8
        cuda_archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or default_archs
        choice += f", archs {cuda_archs}"
    sources, headers = find_files(with_cuda)
    sanitize = sanitizer_flags()
    openmp_compile, openmp_link = openmp_flags()
    # Torch's headers are system headers to the compiler, so that warnings are about this project.
    # Their changes then escape the dependency files: the torch version, as a define on every
    # command, is what recompiles all after an upgrade.
    defines = [f'-DEMBED_EXT_VERSION="{read_version()}"']
    defines += [f'-DEMBED_EXT_BUILD_TORCH_VERSION="{torch.__version__}"']
    if with_cuda:
        defines += ["-DEMBED_EXT_WITH_CUDA", f'-DEMBED_EXT_CUDA_ARCHS="{cuda_archs}"']
    return BuildSettings(
        with_cuda=with_cuda,
        choice=choice,
        sources=sources,
        headers=headers,
        cxx_flags=[*CXX_FLAGS, *openmp_compile, *sanitize, *defines],
        nvcc_flags=[*NVCC_FLAGS],
        link_flags=[*openmp_link, *sanitize],
        cuda_archs=cuda_archs,
    )


def make_extension(settings: BuildSettings) -> Extension:
    """Return ``embed_ext._C`` as a setuptools extension."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    print(f"embed_ext {read_version()}: {settings.choice}", flush=True)
    if settings.with_cuda:
        # torch would otherwise ask the GPUs that it sees, or fail where there are none.
        os.environ["TORCH_CUDA_ARCH_LIST"] = settings.cuda_archs
    kind: Any = CUDAExtension if settings.with_cuda else CppExtension
    extension: Extension = kind(
        "embed_ext._C",
        settings.sources,
        depends=settings.headers,
        extra_compile_args={"cxx": settings.cxx_flags, "nvcc": settings.nvcc_flags},
        extra_link_args=settings.link_flags,
    )
    for path in extension.include_dirs:
        extension.extra_compile_args["cxx"] += ["-isystem", path]
    return extension


def setup_arguments() -> dict[str, Any]:
    """Return what setup() needs; an sdist can be made without torch, a build cannot."""
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        if {"sdist", "egg_info", "--version"} & set(sys.argv):
            return {}
        raise SystemExit(
            "embed_ext is compiled against the torch that it will run with: install torch first, "
            "then run pip with --no-build-isolation"
        ) from None
    return {
        "ext_modules": [make_extension(build_settings())],
        "cmdclass": {"build_ext": BuildExtension},
    }


if __name__ == "__main__":
    # The license is given here, not in pyproject.toml: the form that older setuptools read there is
    # going away, and the form that replaces it they refuse.
    setup(license="BSD-3-Clause", **setup_arguments())
