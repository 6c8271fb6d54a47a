"""Print the pinned requirements of one group, one a line, for ``pip install -r``.

python tools/extras.py test    # an extra of pyproject.toml, such as test or dev
python tools/extras.py build   # what a build without isolation needs, except torch
python tools/extras.py torch   # the installed torch, as a constraint: pip must not change it
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:  # Python 3.10 has no TOML reader; every pip brings one.
    from pip._vendor import tomli as tomllib

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def requirements(group: str) -> list[str]:
    """Return the requirements of one extra, of the build, or the installed torch."""
    if group == "torch":
        return [f"torch=={metadata.version('torch')}"]
    config: dict[str, Any] = tomllib.loads(PYPROJECT.read_text())
    if group == "build":
        lines: list[str] = config["build-system"]["requires"]
        # Which torch to build against is the user's choice, never pip's.
        return [line for line in lines if not line.startswith("torch")]
    extras: dict[str, list[str]] = config["project"]["optional-dependencies"]
    if group not in extras:
        raise SystemExit(f"expected build, torch or one of {', '.join(extras)}, but got {group!r}")
    return extras[group]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print("\n".join(requirements(sys.argv[1])))
