"""What the ops compute, in plain PyTorch: the specification, the oracle of the tests.

These are written to be read, not to be quick, and they check nothing. `lookup.py` has the lookup
and its gradients, `updates.py` what an optimizer does to the rows of a gradient.
"""

from __future__ import annotations

from embed_ext.reference.lookup import (
    embedding,
    embedding_dense_backward,
    embedding_grad_add_,
    embedding_renorm_,
    embedding_sparse_backward,
)
from embed_ext.reference.updates import embedding_adagrad_, embedding_adam_, embedding_sgd_

__all__ = [
    "embedding",
    "embedding_adagrad_",
    "embedding_adam_",
    "embedding_dense_backward",
    "embedding_grad_add_",
    "embedding_renorm_",
    "embedding_sgd_",
    "embedding_sparse_backward",
]
