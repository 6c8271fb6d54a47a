"""fastai: its tables are of a class of its own, and its text models call F.embedding themselves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import embed_ext
from tests.common import assert_close, generator
from tests.models.common import lookups

USERS, ITEMS, RATINGS = 20, 30, 64
pytestmark = pytest.mark.filterwarnings("ignore")


def make_loaders(fastai: Any, of_collab: bool) -> Any:
    """Batches of ratings, of pairs [B, 2] or of categories [B, 2] beside numbers [B, 1]."""
    source = generator(1)
    columns = [torch.randint(n, (RATINGS,), generator=source) for n in (USERS, ITEMS)]
    pairs = torch.stack(columns, dim=1)
    numbers = torch.randn(RATINGS, 1, generator=source)
    ratings = 5 * torch.rand(RATINGS, generator=source)
    inputs = (pairs,) if of_collab else (pairs, numbers)
    loader = DataLoader(TensorDataset(*inputs, ratings), batch_size=16)
    return fastai.data.core.DataLoaders(loader, loader, device=torch.device("cpu"))


def train(fastai: Any, model: nn.Module, loaders: Any) -> list[Tensor]:
    """Two epochs of fastai's own loop; the parameters after them."""
    torch.manual_seed(2)
    learner = fastai.learner.Learner(
        loaders, model, loss_func=fastai.losses.MSELossFlat(), opt_func=fastai.optimizer.SGD
    )
    with learner.no_bar(), learner.no_logging():
        learner.fit(2, 0.01)
    return [parameter.detach() for parameter in learner.model.parameters()]


def make_model(fastai: Any, name: str) -> Any:
    """The model of that name, of USERS and ITEMS."""
    torch.manual_seed(0)
    if name == "EmbeddingDotBias":
        return fastai.collab.EmbeddingDotBias(8, USERS, ITEMS, y_range=(0, 5))
    sizes = [(USERS, 4), (ITEMS, 6)]
    return fastai.tabular.model.TabularModel(sizes, n_cont=1, out_sz=1, layers=[16])


@pytest.mark.parametrize("way", ["convert", "route"])
@pytest.mark.parametrize("name", ["EmbeddingDotBias", "TabularModel"])
def test_collaborative_filtering_and_tables(fastai: Any, name: str, way: str) -> None:
    theirs = make_model(fastai, name)
    ours = copy.deepcopy(theirs)
    loaders = make_loaders(fastai, name == "EmbeddingDotBias")
    expected = train(fastai, theirs, loaders)
    if way == "convert":
        assert not embed_ext.convert(ours).left
    with embed_ext.routed(way == "route"), lookups() as served:
        actual = train(fastai, ours, loaders)
    assert set(served) == {"ours"}
    for ours_now, theirs_now in zip(actual, expected, strict=True):
        assert_close(ours_now, theirs_now)


def test_text_model(fastai: Any) -> None:
    torch.manual_seed(0)
    model = fastai.text.models.AWD_LSTM(40, emb_sz=8, n_hid=8, n_layers=1)
    indices = torch.randint(40, (2, 5), generator=generator(1))
    outputs = []
    kinds = ((Tensor, "ours"), (fastai.text.data.TensorText, "torch's"))
    for kind, server in kinds:
        model.reset()
        torch.manual_seed(1)
        with embed_ext.routed(), lookups() as served:
            outputs.append(model(indices.as_subclass(kind)).as_subclass(Tensor))
        assert set(served) == {server}, kind  # a class of indices gets PyTorch's lookup
    assert_close(outputs[1], outputs[0])
