"""The whole training step: zero_grad(), forward, backward, clipping, optimizer.step().

What a lookup leaves behind is paid for by whoever reads the gradient next, so a backward that is
timed alone does not tell what a user waits for.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_
from torch.optim import SGD, Adagrad, AdamW, Optimizer

from benchmarks.cases import Case, CaseData, make_indices, resolve_dtype
from benchmarks.lookup import Lookup

PREFIX = "step-"
OPTIMIZERS: Mapping[str, type[Optimizer]] = {"sgd": SGD, "adamw": AdamW, "adagrad": Adagrad}
STATES = {"sgd": 0, "adamw": 2, "adagrad": 1}  # tables that the optimizer keeps
POSITIONS = 32  # of a tied output layer: few, or the product would be all that is timed
# While a step is timed the table stays what it was, whatever the number of rounds.
LEARNING_RATE = 1e-6

_NAME = re.compile(
    rf"{PREFIX}(?P<optimizer>{'|'.join(OPTIMIZERS)})(?P<clip>-clip)?(?:-x(?P<uses>[1-9]\d*))?"
    r"(?P<tied>-tied)?(?:-accumulate(?P<accumulate>[1-9]\d*))?(?:-(?P<foreach>(?:no-)?foreach))?"
)

# The micro-batches of a step; in each, the indices [tokens] of every use of the table.
StepBatch = tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True)
class Step:
    """What a training step is made of; its name is the name of a mode."""

    optimizer: str = "sgd"
    clip: bool = False
    uses: int = 1  # lookups of the table in one forward, each with indices of its own
    tied: bool = False  # the table is also the output layer
    foreach: bool | None = None  # of the optimizer and of the clipping; None: torch's choice
    accumulate: int = 1  # micro-batches

    @property
    def name(self) -> str:
        parts = [
            PREFIX + self.optimizer,
            "clip" if self.clip else "",
            f"x{self.uses}" if self.uses > 1 else "",
            "tied" if self.tied else "",
            f"accumulate{self.accumulate}" if self.accumulate > 1 else "",
            "" if self.foreach is None else "foreach" if self.foreach else "no-foreach",
        ]
        return "-".join(part for part in parts if part)

    @property
    def description(self) -> str:
        lookups = f"{self.uses} lookups added up" if self.uses > 1 else "forward"
        parts = [
            "zero_grad()",
            lookups + (", hidden @ weight.T" if self.tied else ""),
            "backward" + (f", over {self.accumulate} micro-batches" if self.accumulate > 1 else ""),
            "clip_grad_norm_()" if self.clip else "",
            f"{OPTIMIZERS[self.optimizer].__name__}.step()",
        ]
        foreach = "" if self.foreach is None else f"; foreach={self.foreach}"
        return ", ".join(part for part in parts if part) + foreach

    @property
    def trains_every_row(self) -> bool:
        """Whether rows change that no token names: by the output layer, or by weight decay."""
        return self.tied or self.optimizer == "adamw"

    def takes_sparse_gradients(self) -> bool:
        return not self.clip and self.optimizer != "adamw"

    @classmethod
    def parse(cls, name: str) -> Step:
        """The step of that name; ValueError if there is none."""
        found = _NAME.fullmatch(name)
        step = found and cls(
            optimizer=found["optimizer"],
            clip=bool(found["clip"]),
            uses=int(found["uses"] or 1),
            tied=bool(found["tied"]),
            foreach={None: None, "foreach": True, "no-foreach": False}[found["foreach"]],
            accumulate=int(found["accumulate"] or 1),
        )
        if step is None or step.name != name:
            raise ValueError(f"{name!r} is not a training step, such as 'step-sgd-clip-x2-tied'")
        return step


def combine(
    optimizers: Sequence[str],
    clips: Sequence[bool],
    uses: Sequence[int],
    *,
    tied: bool = False,
    foreach: bool | None = None,
    accumulate: int = 1,
) -> list[Step]:
    """Every combination, the first of the arguments varying slowest."""
    combinations = itertools.product(optimizers, clips, uses)
    steps = (Step(*chosen, tied, foreach, accumulate) for chosen in combinations)
    return list(dict.fromkeys(steps))


@dataclass(frozen=True)
class StepData:
    """The tensors of a step on one case; every provider gets the same ones."""

    step: Step
    batches: list[StepBatch]
    grad_output: Tensor  # [tokens, embedding_dim]
    # Of a tied output layer: what it multiplies, [positions, embedding_dim], and the gradient of
    # its result, [positions, num_embeddings]. All positive, like grad_output, so that no sum
    # cancels; constant, so that two products are timed and not three.
    hidden: Tensor | None
    grad_logits: Tensor | None

    @property
    def max_norm(self) -> float:
        """Half of what the gradient has at least, so that clipping always has work to do."""
        return 0.5 * float(self.grad_output.double().norm())


def make_step_data(data: CaseData, step: Step, *, batches: int, seed: int, device: str) -> StepData:
    """``batches`` batches of a step, of as many index tensors as it looks up, none twice."""
    width = step.uses * step.accumulate
    drawn = iter(make_indices(data.case, batches * width, seed, device, "step", width))

    def micro_batch() -> tuple[Tensor, ...]:
        return tuple(next(drawn).clone() for _ in range(step.uses))  # each in memory of its own

    hidden = grad_logits = None
    if step.tied:
        hidden = data.grad_output[:POSITIONS].clone()
        generator = torch.Generator(device).manual_seed(seed)
        shape = (hidden.shape[0], data.case.num_embeddings)
        grad_logits = torch.rand(shape, generator=generator, device=device).add_(0.5)
        grad_logits = grad_logits.div_(POSITIONS).to(hidden)
    return StepData(
        step=step,
        batches=[tuple(micro_batch() for _ in range(step.accumulate)) for _ in range(batches)],
        grad_output=data.grad_output,
        hidden=hidden,
        grad_logits=grad_logits,
    )


def training_step(
    lookup: Lookup,
    data: StepData,
    learning_rate: float,
    norm_of: Callable[[Tensor], Tensor] | None = None,
) -> Callable[[StepBatch], None]:
    """What is timed: a function of a batch that trains the table, with an optimizer of its own.

    ``norm_of`` replaces the norm that clipping takes of the gradient
    [num_embeddings, embedding_dim].
    """
    step, call, weight = data.step, lookup.call, lookup.weight
    make: Callable[..., Optimizer] = OPTIMIZERS[step.optimizer]
    optimizer = make([weight], lr=learning_rate, foreach=step.foreach)
    max_norm = data.max_norm

    def backward(output: Tensor) -> None:
        # output: [tokens, embedding_dim]
        if data.hidden is None:
            output.backward(data.grad_output)  # type: ignore[no-untyped-call]
            return
        logits = data.hidden @ weight.T
        torch.autograd.backward((output, logits), (data.grad_output, data.grad_logits))

    def train(batch: StepBatch) -> None:
        optimizer.zero_grad()
        for first, *others in batch:
            output = call(first)
            for indices in others:
                output = output + call(indices)
            backward(output)
        if step.clip and norm_of is None:
            clip_grad_norm_(weight, max_norm, foreach=step.foreach)
        elif step.clip and norm_of is not None and weight.grad is not None:
            clip_grads_with_norm_(weight, max_norm, norm_of(weight.grad), foreach=step.foreach)
        optimizer.step()

    return train


def step_bytes(data: StepData, case: Case) -> int:
    """Bytes that any implementation with a dense-looking gradient must move, a step.

    Lookups as in :func:`benchmarks.modes.minimum_bytes`; the gradient's rows are written once a
    micro-batch, and read as well from the second on. Clipping reads them for the norm, then reads
    and writes them. The optimizer reads the gradient and reads and writes the table, and each of
    its states alike: of the rows that it must change, which with weight decay are all. An output
    layer reads the table, writes the logits, reads their gradient and adds to every row.
    """
    step, row = data.step, case.embedding_dim * case.torch_dtype.itemsize
    total = 0
    for batch in data.batches:
        total += sum(_lookup_bytes(uses, case) for uses in batch)
        micro_rows = [_trained(uses, case) for uses in batch]
        written = sum(micro_rows) + sum(micro_rows[1:])
        graded = case.num_embeddings if step.tied else _trained([i for u in batch for i in u], case)
        changed = case.num_embeddings if step.trains_every_row else graded
        passes = graded * (1 + 3 * step.clip) + changed * 2 * (1 + STATES[step.optimizer])
        if step.tied:
            passes += step.accumulate * 2 * case.num_embeddings
        total += (written + passes) * row
    total //= len(data.batches)
    if data.grad_logits is not None:
        total += step.accumulate * 2 * data.grad_logits.numel() * case.torch_dtype.itemsize
    return total


def _lookup_bytes(uses: Sequence[Tensor], case: Case) -> int:
    """Of forwards and backwards of indices [tokens] each, but for the gradient's rows."""
    row, index = case.embedding_dim * case.torch_dtype.itemsize, resolve_dtype(case.index_dtype)
    total = 0
    for indices in uses:
        padding = 0 if case.padding_idx is None else int((indices == case.padding_idx).sum())
        tokens = indices.numel()
        total += 2 * tokens * index.itemsize
        total += (_distinct([indices]).numel() + tokens + tokens - padding) * row
    return total


def _distinct(indices: Sequence[Tensor]) -> Tensor:
    """The rows that any of the indices, each [tokens], name."""
    return torch.cat(list(indices)).long().unique()  # type: ignore[no-untyped-call,no-any-return]


def _trained(indices: Sequence[Tensor], case: Case) -> int:
    """How many rows the indices, each [tokens], name, padding left out."""
    rows = _distinct(indices)
    return rows.numel() if case.padding_idx is None else int((rows != case.padding_idx).sum())


def step_working_bytes(step: Step, case: Case, providers: int) -> int:
    """Memory that a step needs beside the case's own: gradients, states, and what is checked."""
    states = STATES[step.optimizer]
    timed = 1 + providers * (1 + states)
    # The reference in float64: table, gradient, states, and what the optimizer makes on the way.
    checked = (3 + states) * 8 // case.torch_dtype.itemsize if step.trains_every_row else 0
    logits = 4 * POSITIONS * case.num_embeddings * 8 if step.tied else 0
    return max(timed, checked + 3) * case.table_bytes + step.uses * case.output_bytes + logits


def named_rows(batches: Sequence[StepBatch]) -> Iterator[Tensor]:
    """Every index tensor [tokens] of some batches."""
    for batch in batches:
        for uses in batch:
            yield from uses
