"""Lightning's and Accelerate's loops, with sparse gradients and ``embed_ext.optim``: who clips."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import embed_ext
from tests.common import assert_close
from tests.models.sparse_training import assert_same_parameters, steps, with_sparse_gradients
from tests.models.test_lightning import fit, make_batches, make_model
from tests.models.test_lightning import make_module as make_stock_module

pytestmark = pytest.mark.filterwarnings("ignore")  # what the libraries say of themselves


def make_module(lightning: Any, optimizer: Any, clips: bool, sparse: bool = True) -> Any:
    """The classifier of test_lightning; ``clips``: in its own hook, as docs/training.md says."""

    class Classifier(type(make_stock_module(lightning, "never"))):
        def __init__(self) -> None:
            super().__init__()
            if sparse:
                with_sparse_gradients(self)

        def configure_optimizers(self) -> Any:
            return optimizer(self.parameters(), lr=0.1)

    class Clipping(Classifier):
        def configure_gradient_clipping(
            self,
            optimizer: torch.optim.Optimizer,
            gradient_clip_val: float,
            gradient_clip_algorithm: str | None = None,
        ) -> None:
            embed_ext.clip_grad_norm_(self.parameters(), gradient_clip_val)

    return Clipping() if clips else Classifier()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_clips_in_its_hook(lightning: Any, accumulate: int) -> None:
    options = {"gradient_clip_val": 0.1, "accumulate_grad_batches": accumulate}
    ours = make_module(lightning, embed_ext.optim.Adagrad, clips=True)
    theirs = make_module(lightning, torch.optim.Adagrad, clips=False, sparse=False)
    with steps() as seen:
        fit(lightning, ours, **options)
    assert len(seen) == 8 // accumulate
    layouts = (torch.sparse_coo, torch.strided, torch.strided)
    assert set(seen) == {(embed_ext.optim.Adagrad, layouts)}
    fit(lightning, theirs, **options)
    assert_same_parameters(ours, theirs)


def test_lightning_with_adamw(lightning: Any) -> None:
    ours = make_module(lightning, embed_ext.optim.AdamW, clips=True)
    by_hand = make_module(lightning, embed_ext.optim.AdamW, clips=True)
    fit(lightning, ours, gradient_clip_val=0.1)
    optimizer = by_hand.configure_optimizers()
    for number, batch in enumerate(make_batches()):
        optimizer.zero_grad()
        by_hand.training_step(batch, number).backward()
        embed_ext.clip_grad_norm_(by_hand.parameters(), 0.1)
        optimizer.step()
    assert_same_parameters(ours, by_hand)


def skip_if_torch_clips_sparse_gradients(clip: Callable[..., object]) -> None:
    """As its norms do from version 2.14 on."""
    table = nn.Embedding(3, 2, sparse=True)
    table(torch.tensor([1, 1])).sum().backward()
    try:
        clip(table.parameters(), 0.1)
    except NotImplementedError:
        return
    pytest.skip("this torch clips sparse gradients")


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_lightnings_own_clipping_refuses_sparse_gradients(lightning: Any, algorithm: str) -> None:
    clips = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}
    skip_if_torch_clips_sparse_gradients(clips[algorithm])
    module = make_module(lightning, embed_ext.optim.AdamW, clips=False)
    before = copy.deepcopy(module.model.state_dict())
    with pytest.raises(NotImplementedError, match="Sparse"):
        fit(lightning, module, gradient_clip_val=0.1, gradient_clip_algorithm=algorithm)
    for name, value in module.model.state_dict().items():
        assert torch.equal(value, before[name])


def make_accelerator(accelerate: Any, precision: str) -> Any:
    """Accelerate keeps its settings for the process: without those of an earlier test."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    return accelerate.Accelerator(mixed_precision=precision, cpu=True)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(accelerate: Any, precision: str) -> None:
    results = []
    for library in (embed_ext, torch):
        accelerator = make_accelerator(accelerate, precision)
        model = make_model()
        if library is embed_ext:
            with_sparse_gradients(model)
        prepared, optimizer, loader = accelerator.prepare(
            model,
            library.optim.SGD(model.parameters(), lr=0.5),
            make_batches(),
        )
        with steps() as seen:
            for indices, labels in loader:
                accelerator.backward(nn.functional.cross_entropy(prepared(indices), labels))
                if library is torch:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                else:
                    accelerator.unscale_gradients()
                    embed_ext.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
        table = torch.sparse_coo if library is embed_ext else torch.strided
        assert {layouts[0] for _, layouts in seen} == {table}
        results.append([parameter.detach() for parameter in model.parameters()])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


def test_accelerates_own_clipping_refuses_sparse_gradients(accelerate: Any) -> None:
    skip_if_torch_clips_sparse_gradients(nn.utils.clip_grad_norm_)
    accelerator = make_accelerator(accelerate, "no")
    model = make_model()
    with_sparse_gradients(model)
    for indices, labels in make_batches():
        accelerator.backward(nn.functional.cross_entropy(model(indices), labels))
        with pytest.raises(NotImplementedError, match="Sparse"):
            accelerator.clip_grad_norm_(model.parameters(), 0.1)
