"""Opacus: gradients of each sample, by each of its ways, of a table converted before or after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import embed_ext
from tests.common import assert_close, generator, make_indices, run_python

WORDS, LENGTH, CLASSES, BATCH = 13, 5, 3, 4
pytestmark = pytest.mark.filterwarnings("ignore")
each_order = pytest.mark.parametrize("order", ["convert_first", "convert_last"])


def make_model() -> Any:
    """Indices [B, LENGTH] -> logits [B, CLASSES]."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(WORDS, 8), nn.Flatten(), nn.Linear(8 * LENGTH, CLASSES))


def make_samples(size: int) -> tuple[Tensor, Tensor]:
    """Indices [size, LENGTH] and labels [size]."""
    labels = torch.randint(CLASSES, (size,), generator=generator(3))
    return make_indices((size, LENGTH), WORDS), labels


def wrapped(opacus: Any, mode: str, order: str) -> Any:
    """The model as Opacus wraps it; order "never" leaves it stock."""
    model = make_model()
    if order == "convert_first":
        embed_ext.convert(model)
    model = opacus.grad_sample.prepare_module(model, mode, batch_first=True, loss_reduction="mean")
    if order == "convert_last":
        assert len(embed_ext.convert(model).swapped) == 1
    return model


def step(model: nn.Module) -> None:
    """One forward and backward over a batch."""
    indices, labels = make_samples(BATCH)
    nn.functional.cross_entropy(model(indices), labels).backward()


@each_order
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ew"])
def test_gradients_of_each_sample(opacus: Any, mode: str, order: str) -> None:
    ours, theirs = wrapped(opacus, mode, order), wrapped(opacus, mode, "never")
    for model in (ours, theirs):
        step(model)
    for actual, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert expected.grad_sample.shape == (BATCH, *expected.shape)
        assert_close(actual.grad_sample, expected.grad_sample)
    # Left there by torch.func's way, which is the slow one.
    assert hasattr(ours._module[0], "ft_compute_sample_grad") == (mode == "functorch")


@each_order
def test_norms_of_ghost_clipping(opacus: Any, order: str) -> None:
    ours, theirs = wrapped(opacus, "ghost", order), wrapped(opacus, "ghost", "never")
    for model in (ours, theirs):
        step(model)
    assert_close(ours.get_norm_sample(), theirs.get_norm_sample())
    assert not hasattr(ours._module[0], "ft_compute_sample_grad")
    assert ours._module[0].weight.grad_sample is None  # as no gradient of a sample was made


@each_order
@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_private_training(opacus: Any, mode: str, order: str) -> None:
    results = []
    for swap in (True, False):
        model = make_model()
        if swap and order == "convert_first":
            embed_ext.convert(model)
        loader = DataLoader(TensorDataset(*make_samples(3 * BATCH)), batch_size=BATCH)
        criterion: Any = nn.CrossEntropyLoss()
        private = opacus.PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
            data_loader=loader,
            criterion=criterion,
            noise_multiplier=0.0,
            max_grad_norm=0.1,
            poisson_sampling=False,
            grad_sample_mode=mode,
        )
        module, optimizer, *others = private
        if mode == "ghost":
            criterion = others[0]
        if swap and order == "convert_last":
            assert len(embed_ext.convert(module).swapped) == 1
        for indices, labels in loader:
            optimizer.zero_grad()
            criterion(module(indices), labels).backward()
            optimizer.step()
        results.append([parameter.detach() for parameter in model.parameters()])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


def test_opacus_may_be_imported_first(opacus: Any) -> None:
    code = """
import warnings
warnings.simplefilter("ignore")
import opacus, embed_ext
assert embed_ext.Embedding in opacus.GradSampleModule.GRAD_SAMPLERS
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
