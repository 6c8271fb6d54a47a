"""Mirror the sources into another folder, to build there without touching this tree.

    python tools/source_tree.py DESTINATION

What is built in the destination stays, so a second build there is quick; sources that are gone
from this tree go from the mirror too.
"""

from __future__ import annotations

import filecmp
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_SOURCES = {"build", "dist", "__pycache__", "results"}
BUILT_SUFFIXES = {".so", ".pyc", ".egg-info"}


def is_source(path: Path) -> bool:
    """Whether a file or folder belongs to the sources."""
    if path.name in NOT_SOURCES or path.suffix in BUILT_SUFFIXES or path.is_symlink():
        return False
    if path.is_dir():
        return not path.name.startswith(".") and not (path / "pyvenv.cfg").exists()
    return True


def mirror(source: Path, destination: Path) -> None:
    """Copy what is new or changed.

    A copy is as old as its copying: with the original's time, a file that was edited during the
    last build in the mirror would look older than the object made from the text before.
    """
    destination.mkdir(parents=True, exist_ok=True)
    names = set()
    for path in source.iterdir():
        if not is_source(path):
            continue
        names.add(path.name)
        target = destination / path.name
        if path.is_dir():
            mirror(path, target)
        elif not target.exists() or not filecmp.cmp(path, target, shallow=False):
            shutil.copy(path, target)
    for target in destination.iterdir():
        if target.name not in names and is_source(target):
            shutil.rmtree(target) if target.is_dir() else target.unlink()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    mirror(ROOT, Path(sys.argv[1]).resolve())
