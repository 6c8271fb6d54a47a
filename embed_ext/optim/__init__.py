"""Optimizers for models with embedding tables: a step costs what the rows in use cost.

Each is the class of ``torch.optim`` of its name for all parameters whose gradient is dense, so that
one optimizer serves a whole model and a program changes one import. A table whose gradient is
sparse (``embed_ext.Embedding(..., sparse=True)``) is updated row by row, in one pass.

>>> import torch, embed_ext
>>> model = torch.nn.Sequential(embed_ext.Embedding(1000, 8, sparse=True), torch.nn.Linear(8, 1))
>>> optimizer = embed_ext.optim.AdamW(model.parameters(), lr=1e-3)
>>> model(torch.tensor([3, 14, 15])).sum().backward()
>>> optimizer.step()
"""

from __future__ import annotations

from embed_ext.optim.adagrad import Adagrad, RowwiseAdagrad
from embed_ext.optim.adam import Adam, AdamW, RowwiseAdam
from embed_ext.optim.catching_up import catch_up
from embed_ext.optim.in_backward import step_in_backward
from embed_ext.optim.sgd import SGD

__all__ = [
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "RowwiseAdagrad",
    "RowwiseAdam",
    "catch_up",
    "step_in_backward",
]
