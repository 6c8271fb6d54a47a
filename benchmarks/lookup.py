"""What a provider builds, and how one says that it cannot."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from benchmarks.environment import without_folders


@dataclass(frozen=True)
class Lookup:
    """A table ready to be looked up: ``call`` maps indices [tokens] to [tokens, embedding_dim]."""

    call: Callable[[Tensor], Tensor]
    weight: Tensor  # [num_embeddings, embedding_dim], the leaf that gets the gradient


Build = Callable[[Tensor, "int | None"], Lookup]


def needs(module: str) -> Callable[[], str | None]:
    """A check that says why ``module`` cannot be imported, in one line."""

    def why() -> str | None:
        try:
            importlib.import_module(module)
        except Exception as error:  # an extension that does not load may raise anything
            first_line = (str(error).splitlines() or [""])[0]
            reason = without_folders(f"{type(error).__name__}: {first_line}")
            return f"{module} cannot be imported: {reason}"
        return None

    return why
