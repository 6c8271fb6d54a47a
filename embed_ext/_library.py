"""Loads the compiled part, and completes it with what only Python can register."""

from __future__ import annotations

from importlib import import_module

import torch

_REBUILD = (
    "rebuild it against the torch that is installed: `pip install --no-build-isolation "
    "--force-reinstall --no-deps .` (or `python setup.py build_ext --inplace`) in its source folder"
)


def _minor(version: str) -> list[str]:
    return version.split("+")[0].split(".")[:2]


def load() -> None:
    """Import ``embed_ext._C``.

    Raises:
        ImportError: in one sentence that says what to do, where the compiled part is missing or
            belongs to another torch.
    """
    try:
        compiled = import_module("embed_ext._C")
    except ModuleNotFoundError as error:
        if error.name != "embed_ext._C":
            raise
        raise ImportError(
            "embed_ext is not compiled here: build it with `pip install --no-build-isolation .` "
            "(or `python setup.py build_ext --inplace`) in its source folder"
        ) from None
    except ImportError as error:  # symbols that this torch does not have
        raise ImportError(
            f"embed_ext's compiled part does not fit torch {torch.__version__} ({error}); "
            f"{_REBUILD}"
        ) from None
    built_with = compiled.build_config()["torch"]
    if _minor(built_with) != _minor(torch.__version__):
        raise ImportError(
            f"embed_ext was built with torch {built_with}, but torch {torch.__version__} is "
            f"installed; {_REBUILD}"
        )


load()

from embed_ext import _nested, _vmap  # noqa: E402
from embed_ext._after_import import after_import  # noqa: E402

_vmap.register()
_nested.register()
after_import("torch.distributed.tensor", lambda: import_module("embed_ext._sharding"))
after_import("opacus.grad_sample", lambda: import_module("embed_ext._opacus").register())
