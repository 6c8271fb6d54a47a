"""Who runs when follows from the seed, and from nothing else."""

from __future__ import annotations

import pytest
import torch

from tests.common import make_indices, make_table
from tests.emulator import control

pytestmark = pytest.mark.emulated

ops = torch.ops.embed_ext


def schedule_of(seed: int) -> int:
    weight, indices = make_table(100, 40), make_indices((200,), 100)
    control.set_seed(seed)
    before = control.launches()
    ops.embedding_dense_backward(ops.embedding(weight, indices), indices, 100)
    assert control.launches() == before + 2
    return control.schedule_digest()


def test_the_same_seed_gives_the_same_order() -> None:
    for seed in (0, 1, 2):
        assert schedule_of(seed) == schedule_of(seed)


def test_other_seeds_give_other_orders() -> None:
    assert len({schedule_of(seed) for seed in range(20)}) == 20
