"""Lightning: a module converted before or at the start of training, its checkpoint, and Fabric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import embed_ext
from tests.common import assert_close, generator, make_indices

WORDS, LENGTH, CLASSES = 40, 5, 3
pytestmark = pytest.mark.filterwarnings("ignore")  # its advice on workers and devices


def make_model() -> Any:
    """Indices [B, LENGTH] -> logits [B, CLASSES]."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(WORDS, 8, padding_idx=0), nn.Flatten(), nn.Linear(8 * LENGTH, CLASSES)
    )


def make_batches() -> Any:
    """Eight batches of indices and labels."""
    labels = torch.randint(CLASSES, (32,), generator=generator(3))
    return DataLoader(TensorDataset(make_indices((32, LENGTH), WORDS), labels), batch_size=4)


def make_module(lightning: Any, when: str) -> Any:
    """The model as Lightning trains it, converted "before", at its "start" or "never"."""

    class Classifier(lightning.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model()
            if when == "before":
                embed_ext.convert(self)

        def on_fit_start(self) -> None:
            if when == "start":
                embed_ext.convert(self)

        def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
            indices, labels = batch
            return nn.functional.cross_entropy(self.model(indices), labels)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.5)

    return Classifier()


def fit(lightning: Any, module: Any, **options: Any) -> Any:
    """Train for an epoch; the trainer."""
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, make_batches())
    return trainer


@pytest.mark.parametrize("when", ["before", "start"])
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2}, {"precision": "bf16-true"}],
    ids=["plain", "clipped_micro_batches", "bfloat16"],
)
def test_training(lightning: Any, options: dict[str, Any], when: str) -> None:
    ours, theirs = make_module(lightning, when), make_module(lightning, "never")
    before = theirs.model[0].weight.detach().clone()
    for module in (ours, theirs):
        fit(lightning, module, **options)
    assert type(ours.model[0]) is embed_ext.Embedding
    assert type(theirs.model[0]) is nn.Embedding
    assert not torch.equal(theirs.model[0].weight, before)
    for actual, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(actual.detach(), expected.detach())


def test_checkpoint_loads_into_stock(lightning: Any, tmp_path: Path) -> None:
    module = make_module(lightning, "before")
    fit(lightning, module).save_checkpoint(tmp_path / "last.ckpt")
    stock = make_module(lightning, "never")
    stock.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    indices = make_indices((4, LENGTH), WORDS)
    assert torch.equal(stock.model(indices), module.model(indices))


@pytest.mark.parametrize("when", ["before", "after"])
def test_fabric(lightning: Any, when: str) -> None:
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    results = []
    for swap in (True, False):
        model = make_model()
        if swap and when == "before":
            embed_ext.convert(model)
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        if swap and when == "after":
            assert len(embed_ext.convert(wrapped).swapped) == 1
        for indices, labels in fabric.setup_dataloaders(make_batches()):
            optimizer.zero_grad()
            fabric.backward(nn.functional.cross_entropy(wrapped(indices), labels))
            optimizer.step()
        results.append([parameter.detach() for parameter in model.parameters()])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)
