"""Random programs that use one table in many ways; .grad is to be the one of nn.Embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import embed_ext
from tests.backward_ways import WAYS
from tests.joined_gradients import SPELLINGS, assert_same, gradient, integers

# A value is [TOKENS, WIDTH]; integers stay far below 2**53.
ROWS, WIDTH, TOKENS = 6, 4, 5


@dataclass(frozen=True)
class Instruction:
    """What makes the next value; `first` and `second` are earlier values, counted from the end."""

    name: str
    spelling: str
    seed: int
    first: int
    second: int


NAMES = ["lookup"] * 4 + ["tied", "tied", "linear", "rows", "scaled", "added", "cat"]
NAMES += ["hook", "leaf hook", "node hook", "retained", "constant", "detached", "held"]

instructions = st.builds(
    Instruction,
    name=st.sampled_from(NAMES),
    spelling=st.sampled_from([name for name in SPELLINGS if "sparse" not in name]),
    seed=st.integers(0, 50),
    first=st.integers(0, 9),
    second=st.integers(0, 9),
)


def look_up(table: nn.Embedding, it: Instruction) -> Tensor:
    spelling = it.spelling if isinstance(table, embed_ext.Embedding) else "module"
    generator = torch.Generator().manual_seed(it.seed)
    indices = torch.randint(ROWS, (TOKENS,), generator=generator)
    if spelling == "sibling":  # of this table's size
        twin = embed_ext.Embedding(ROWS, WIDTH, keep_grad_buffer=table.keep_grad_buffer)
        twin.weight = table.weight
        return twin(indices)
    return SPELLINGS[spelling](table, indices)


def follow(table: nn.Embedding, it: Instruction, values: list[Tensor], held: list[Tensor]) -> None:
    """Append one value."""
    weight, numbers = table.weight, integers(ROWS, WIDTH, seed=it.seed)
    first = values[-1 - it.first % len(values)]
    second = values[-1 - it.second % len(values)]
    factor = it.seed % 4 - 1
    result = first
    if it.name == "lookup":
        result = look_up(table, it)
    elif it.name == "tied":
        result = first @ weight.t() @ numbers
    elif it.name == "linear":
        result = nn.functional.linear(numbers[:TOKENS], weight)[:, :WIDTH]
    elif it.name == "rows":
        result = (weight * numbers)[1:]
    elif it.name == "scaled":
        result = first * factor
    elif it.name == "added":
        result = first + second
    elif it.name == "cat":
        result = torch.cat([first, second])[2 : 2 + TOKENS]
    elif it.name == "constant":
        with torch.no_grad():
            result = look_up(table, it)
    elif it.name == "detached":
        result = first.detach() * factor
    elif it.name == "hook" and first.requires_grad:
        first.register_hook(lambda grad: grad * factor)
    elif it.name == "leaf hook":
        weight.register_hook(lambda grad: grad + 1)
    elif it.name == "node hook" and first.grad_fn is not None:
        first.grad_fn.register_hook(
            lambda inputs, _: held.extend(g for g in inputs if g is not None)
        )
    elif it.name == "retained" and first.requires_grad:
        first.retain_grad()
    elif it.name == "held" and first.requires_grad:
        first.register_hook(held.append)
    values.append(result)


def loss_of(table: nn.Embedding, program: list[Instruction], held: list[Tensor]) -> Tensor:
    values = [look_up(table, Instruction("lookup", "module", 0, 0, 0))]
    for it in program:
        follow(table, it, values, held)
    return torch.stack(
        [(value * integers(TOKENS, WIDTH, seed=seed)).sum() for seed, value in enumerate(values)]
    ).sum()


def differentiate(
    table: nn.Embedding, programs: list[list[Instruction]], way: str, zeroed: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """-> the gradients after each program, and what was held on the way, both as they are then."""
    held: list[Tensor] = []
    grads = []
    for program in programs:
        weight = table.weight
        table.weight = nn.Parameter(weight.detach())  # without the hooks of the program before
        table.weight.grad = None if zeroed else weight.grad
        del weight
        if way == "asked for":
            grads.extend(torch.autograd.grad(loss_of(table, program, held), table.weight))
        else:
            WAYS[way](table, lambda program=program: loss_of(table, program, held))
            grads.append(gradient(table).clone())
    return grads, held


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    programs=st.lists(st.lists(instructions, max_size=10), min_size=1, max_size=3),
    way=st.sampled_from(["backward", "backward", "retained", "inputs", "checkpoint", "asked for"]),
    zeroed=st.booleans(),
    keep=st.booleans(),
)
def test_as_torch(programs: list[list[Instruction]], way: str, zeroed: bool, keep: bool) -> None:
    weight = integers(ROWS, WIDTH)
    ours = embed_ext.Embedding(ROWS, WIDTH, _weight=weight.clone(), keep_grad_buffer=keep)
    theirs = nn.Embedding(ROWS, WIDTH, _weight=weight.clone())
    actual, expected = (differentiate(t, programs, way, zeroed) for t in (ours, theirs))
    for mine, stock in zip(actual, expected, strict=True):
        assert len(mine) == len(stock)
        for grad, wanted in zip(mine, stock, strict=True):
            assert_same(grad, wanted)
