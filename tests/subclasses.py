"""Subclasses of nn.Embedding, each with another way to the lookup, for the tests of convert()."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import embedding

from tests.swapping import Inherits, Scaled

T = TypeVar("T")


class Positions(nn.Embedding):
    """Asks with other arguments than nn.Embedding, as BART's positions do."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        self.offset = 2
        super().__init__(num_embeddings + self.offset, embedding_dim)

    def forward(self, input_ids: Tensor, past: int = 0) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids + self.offset + past)


class TwoSteps(Scaled):
    """Reaches nn.Embedding's forward by way of another subclass."""

    def forward(self, input: Tensor) -> Tensor:
        return super(TwoSteps, self).forward(input) + 1  # noqa: UP008


class ByMethod(nn.Embedding):
    """Calls super().forward in a method of its own, one with a mangled name."""

    def forward(self, input: Tensor) -> Tensor:
        return self.__look_up(input) * 3

    def __look_up(self, input: Tensor) -> Tensor:
        return super().forward(input)


class Shifts(nn.Module):
    """A mixin between a class and nn.Embedding."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) - 1  # type: ignore[misc]


class Mixed(Shifts, nn.Embedding, Generic[T]):
    """Inherits a forward that is not nn.Embedding's."""


class ByFunction(nn.Embedding):
    """Calls the function, with options of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight, padding_idx=1, scale_grad_by_freq=True) * 2


class ByLongName(nn.Embedding):
    """Calls the function by its whole name, with a table that is not the parameter."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.nn.functional.embedding(input, self.weight * 2, self.padding_idx)


class ByEarlierName(nn.Embedding):
    """Calls the function by a name that routed() does not reach."""

    def forward(self, input: Tensor) -> Tensor:
        return embedding(input, self.weight)


class ByOp(nn.Embedding):
    """Calls what PyTorch's function calls."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.embedding(self.weight, input, -1) + torch.embedding(self.weight, input, 1)


class ByBase(nn.Embedding):
    """Calls the method of nn.Embedding by its name, past everything between."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.Embedding.forward(self, input) * 2


class Indexes(nn.Embedding):
    """Looks up nothing, as Whisper's positions do."""

    def forward(self, input: Tensor) -> Tensor:
        return self.weight[input]


class CallsOther(Indexes):
    """Calls a super().forward that does not reach nn.Embedding's, and another's `embedding`."""

    embedding = 2

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embedding + torch.zeros(3)


class OwnReduce(Scaled):
    """Says itself how it is copied and pickled."""

    def __reduce__(self) -> Any:
        arguments = (self.num_embeddings, self.embedding_dim)
        return (type(self).make, arguments, {**vars(self), "note": "reduced"})

    @classmethod
    def make(cls, num_embeddings: int, embedding_dim: int) -> OwnReduce:
        """Called when it is loaded."""
        return cls(num_embeddings, embedding_dim)


class OwnState(Scaled):
    """Keeps its own state, and answers for names that are not there."""

    def __getstate__(self) -> dict[str, Any]:
        return {"inner": dict(vars(self))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state["inner"])

    def __getattr__(self, name: str) -> Any:
        return 7 if name == "seven" else super().__getattr__(name)


# What is said of each once it is swapped.
INHERITED = "by the forward that it inherits"
SUPER = "by its super().forward"
FUNCTION = "by the lookups in its forward"
SERVED: dict[type[nn.Embedding], str] = {
    Inherits: INHERITED,
    Scaled: SUPER,
    Positions: SUPER,
    TwoSteps: SUPER,
    ByMethod: SUPER,
    Mixed: SUPER,
    OwnReduce: SUPER,
    OwnState: SUPER,
    ByFunction: FUNCTION,
    ByLongName: FUNCTION,
    ByEarlierName: FUNCTION,
    ByOp: FUNCTION,
    ByBase: FUNCTION,
}
