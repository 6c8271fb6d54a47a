"""Models, subclasses and a watching compiler, for the tests of convert() and of routing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from embed_ext import convert, revert

INDICES = torch.tensor([[1, 4], [4, 0]])


class Tied(nn.Module):
    """Words and positions in, words out; `same` and `words` are one module, `out` shares weights.

    indices [B, L] -> logits [B, L, V]
    """

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4, padding_idx=0)
        self.positions = nn.Embedding(9, 4)
        self.same = self.words
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.words.weight

    def forward(self, indices: Tensor) -> Tensor:
        positions = self.positions(torch.arange(indices.shape[1]))
        hidden = self.words(indices) + self.same(indices.flip(1)) + positions
        return self.out(hidden)  # type: ignore[no-any-return]


class Inherits(nn.Embedding):
    """A subclass that looks up as nn.Embedding does."""


class Scaled(nn.Embedding):
    """A subclass that scales what its base class looks up, as Gemma's word embedding does."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Watched:
    """A compiled model that says, at each call, whose lookup the graph has that ran."""

    def __init__(self, model: nn.Module, fullgraph: bool = True) -> None:
        torch.compiler.reset()
        self.model = model
        self.ran: list[str] = []
        self.compiled: Any = torch.compile(model, backend=self.backend, fullgraph=fullgraph)

    def backend(self, graph: fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        """Run the graph as it is."""
        ops = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]

        def run(*args: Any) -> Any:
            self.ran.append("ours" if "embed_ext.embedding" in ops else "torch's")
            return graph.forward(*args)

        return run

    def served_across_swaps(self) -> list[str]:
        """Who serves as the model is, converted, reverted, and converted again."""
        seen = [self()]
        for swap in (convert, revert, convert):
            swap(self.model)
            seen.append(self())
        return seen

    def __call__(self) -> str:
        assert torch.equal(self.compiled(INDICES), self.model(INDICES))
        return self.ran[-1]
