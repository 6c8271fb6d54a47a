"""A drop-in ``nn.Embedding`` whose cost follows the rows a batch touches.

>>> import torch, embed_ext
>>> table = embed_ext.Embedding(10, 3)
>>> table(torch.tensor([[1, 2], [4, 9]])).shape
torch.Size([2, 2, 3])
"""

from __future__ import annotations

from embed_ext import _library as _library  # loads the compiled part; everything below needs it
from embed_ext import functional, optim, reference, routing
from embed_ext._index_check import check_indices, index_check, set_index_check
from embed_ext._info import build_info
from embed_ext._kept_gradient import set_verify_kept_gradients, verify_kept_gradients
from embed_ext._memory import cached_bytes, empty_cache
from embed_ext._version import __version__
from embed_ext.clip import clip_grad_norm_, clip_grad_value_, get_total_norm
from embed_ext.convert import ConversionReport, convert, revert
from embed_ext.function import EmbeddingFunction
from embed_ext.modules import Embedding
from embed_ext.routing import route, routed

__all__ = [
    "ConversionReport",
    "Embedding",
    "EmbeddingFunction",
    "__version__",
    "build_info",
    "cached_bytes",
    "check_indices",
    "clip_grad_norm_",
    "clip_grad_value_",
    "convert",
    "empty_cache",
    "functional",
    "get_total_norm",
    "index_check",
    "optim",
    "reference",
    "revert",
    "route",
    "routed",
    "routing",
    "set_index_check",
    "set_verify_kept_gradients",
    "verify_kept_gradients",
]
