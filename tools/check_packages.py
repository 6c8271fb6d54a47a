"""Build the sdist and the wheel into dist/, and try each in an environment of its own.

The environments borrow torch from the running Python through a .pth file: nothing is downloaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

from source_tree import ROOT, mirror

# Without the cache, which would answer a changed sdist of the same name with the wheel from before.
PIP_OPTIONS = ["--no-cache-dir", "--no-index", "--no-deps", "--no-build-isolation"]
IN_SDIST = ["setup.py", "pyproject.toml", "LICENSE", "README.md", "Makefile", "tests/", "tools/"]


def run(*command: str | Path, cwd: Path) -> None:
    """Run a command; PYTHONPATH is left out, as it could let the source tree in."""
    print(f"$ {' '.join(map(str, command))}", flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, cwd=cwd, env=environment, check=True)


def build(work: Path, dist: Path) -> tuple[Path, Path]:
    """Return the sdist, and the wheel built from it."""
    # In a copy: setuptools would also pack what an older build left behind in build/lib.
    mirror(ROOT, work / "tree")
    make_sdist = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", make_sdist, dist, cwd=work / "tree")
    (sdist,) = dist.glob("*.tar.gz")
    run(sys.executable, "-m", "pip", "wheel", *PIP_OPTIONS, "--wheel-dir", dist, sdist, cwd=work)
    (wheel,) = dist.glob("*.whl")
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path) -> list[str]:
    """Return what is missing from the packages, or has no business in them."""
    problems = []
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*") if path.is_file()}
    for name in sorted(wanted | {name for name in IN_SDIST if not name.endswith("/")}):
        if name not in in_sdist:
            problems.append(f"sdist: no {name}")
    for folder in (name for name in IN_SDIST if name.endswith("/")):
        if not any(name.startswith(folder) for name in in_sdist):
            problems.append(f"sdist: nothing of {folder}")

    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    package = [path for path in ROOT.glob("embed_ext/**/*") if path.suffix in (".py", ".pyi")]
    wanted = {str(path.relative_to(ROOT)) for path in package} | {"embed_ext/py.typed"}
    problems += [f"wheel: no {name}" for name in sorted(wanted - in_wheel)]
    extra = [name for name in in_wheel - wanted if ".dist-info/" not in name]
    compiled = [name for name in extra if name.startswith("embed_ext/_C.")]
    if len(compiled) != 1:
        problems.append(f"wheel: expected one compiled module, found {compiled}")
    problems += [f"wheel: {name} does not belong there" for name in extra if name not in compiled]
    return problems


def try_package(package: Path, work: Path) -> None:
    """Install one package in a new environment and run its self-check from an empty folder."""
    environment = work / f"try-{package.suffix[1:]}"
    elsewhere = work / f"elsewhere-{package.suffix[1:]}"
    elsewhere.mkdir()
    run(sys.executable, "-m", "venv", environment, cwd=work)
    python = environment / "bin" / "python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.check_output([python, "-c", query], text=True).strip()
    borrowed = sysconfig.get_path("purelib")
    Path(site, "borrowed_torch.pth").write_text(f"{borrowed}\n")
    run(python, "-m", "pip", "install", "--quiet", *PIP_OPTIONS, package, cwd=elsewhere)
    where = "import embed_ext, sys; assert embed_ext.__file__.startswith(sys.prefix)"
    run(python, "-c", where, cwd=elsewhere)
    run(python, "-m", "embed_ext", cwd=elsewhere)


def main() -> int:
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    dist.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sdist, wheel = build(work, dist)
        for path in (sdist, wheel):
            print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")
        problems = check_contents(sdist, wheel)
        if problems:
            print("\n".join(problems))
            return 1
        for path in (wheel, sdist):
            try_package(path, work)
    print(f"Both packages install and pass their self-check: {dist}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
