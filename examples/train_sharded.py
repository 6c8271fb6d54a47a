"""Train skip-gram with both tables sharded by rows over several processes.

    torchrun --standalone --nproc-per-node 2 examples/train_sharded.py

Each process has a part of the rows of each table, of their gradients and of the optimizer's state,
and takes a part of every batch. A second copy of the model, whole and on nn.Embedding, is trained
on whole batches beside it; the exit status is 1 if the two loss curves disagree.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

import embed_ext
from skipgram.batches import Batch, batch_stream
from skipgram.corpus import build_corpus, source_files
from skipgram.model import SkipGram
from skipgram.train import LOSS_RTOL, largest_disagreement

NUMBERS = {"tokens": 100_000, "vocab": 5000, "dim": 64, "batch": 2048, "steps": 30}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train skip-gram with tables sharded by rows, beside a whole copy of them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, value in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


def shard(model: SkipGram, ranks: DeviceMesh) -> None:
    """Give each process its rows. It passes its own part of a batch and gets that part's rows."""
    style = RowwiseParallel(input_layouts=Shard(0), output_layouts=Shard(0))
    parallelize_module(model, ranks, {"inputs": style, "outputs": style})


def part_of(batch: Batch, ranks: DeviceMesh) -> Batch:
    rank, count = ranks.get_local_rank(), ranks.size()
    return Batch(batch.centres.chunk(count)[rank], batch.candidates.chunk(count)[rank])


def train(model: SkipGram, batches: Iterable[Batch], share: int) -> list[float]:
    """The loss of each step, averaged over the `share` processes that have a part of a batch."""
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = model(batch) / share
        loss.backward()
        optimizer.step()
        total = loss.detach()
        if share > 1:
            dist.all_reduce(total)
        losses.append(total.item())
    return losses


def describe(model: SkipGram) -> str:
    """What one process has of the first table."""
    weight = model.inputs.weight
    assert isinstance(weight, DTensor) and isinstance(weight.grad, DTensor)
    return (
        f"table {tuple(weight.shape)}: this process has {tuple(weight.to_local().shape)} of it, "
        f"and {tuple(weight.grad.to_local().shape)} of its gradient"
    )


def main() -> int:
    """Train both; returns 0 if the loss curves agree and 1 if they do not."""
    options = parse_options()
    dist.init_process_group("gloo")
    ranks = init_device_mesh("cpu", (dist.get_world_size(),))
    if options.batch % ranks.size():
        print(f"--batch must be a multiple of {ranks.size()}, the processes", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    torch.manual_seed(0)
    corpus = build_corpus(source_files(), options.tokens, options.vocab)
    stream = batch_stream(corpus, options.batch, window=5, negatives=5, seed=0)
    batches = [batch for batch, _ in zip(stream, range(options.steps), strict=False)]

    sharded = SkipGram(embed_ext.Embedding, len(corpus.words), options.dim, sparse=False)
    whole = SkipGram(nn.Embedding, len(corpus.words), options.dim, sparse=False)
    whole.load_state_dict(sharded.state_dict())
    shard(sharded, ranks)
    losses = train(sharded, (part_of(batch, ranks) for batch in batches), share=ranks.size())
    expected = train(whole, batches, share=1)

    apart = largest_disagreement(losses, expected)
    if dist.get_rank() == 0:
        print(describe(sharded))
        print(f"loss: {losses[0]:.4f} at the first step, {losses[-1]:.4f} at step {len(losses)}")
        verdict = "agrees" if apart <= LOSS_RTOL else "DISAGREES"
        print(f"The loss {verdict} with the unsharded run (relative difference {apart:.1e}).")
    dist.destroy_process_group()
    return int(apart > LOSS_RTOL)


if __name__ == "__main__":
    if "RANK" not in os.environ:
        sys.exit(
            "Start it with: torchrun --standalone --nproc-per-node 2 examples/train_sharded.py"
        )
    sys.exit(main())
