"""A progress bar where tqdm is installed."""

from __future__ import annotations

import contextlib
from typing import Protocol


class Bar(Protocol):
    """What is used of a bar."""

    def update(self, n: int = 1) -> object: ...

    def set_description(self, desc: str) -> object: ...


class _Silent:
    def update(self, n: int = 1) -> None:
        pass

    def set_description(self, desc: str) -> None:
        pass


def progress_bar(total: int, *, shown: bool) -> contextlib.AbstractContextManager[Bar]:
    """A bar of ``total`` steps; a silent one if it is not to be shown, or tqdm is missing."""
    if shown:
        try:
            from tqdm import tqdm
        except ImportError:
            print("no progress bar: tqdm is not installed (pip install 'embed_ext[bench]')")
        else:
            bar: contextlib.AbstractContextManager[Bar] = tqdm(total=total, unit="step")
            return bar
    return contextlib.nullcontext(_Silent())
