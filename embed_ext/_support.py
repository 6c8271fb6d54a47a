"""Which tables this project's ops take, for those who choose between them and PyTorch's own."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from embed_ext import _C

# Anything else may know torch's lookup and not ours (quantized weights, for instance).
PLAIN_TYPES: frozenset[type] = frozenset({Tensor, nn.Parameter, FakeTensor, FunctionalTensor})
TENSOR_TYPES: set[type] = set(PLAIN_TYPES)  # and those that lookups have rules for, once imported
INDEX_DTYPES = {
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
}
_HAS_CUDA = _C.build_config()["cuda_archs"] is not None
DEVICES = {"cpu", "meta", "cuda"} if _HAS_CUDA else {"cpu", "meta"}


def why_not(weight: object, types: Collection[type] = TENSOR_TYPES) -> str | None:
    """Say why the ops do not take this table [V, D], of one of these types; None if they do."""
    if type(weight) not in types:
        return f"its weight is of type {type(weight).__name__}, for which embed_ext has no rules"
    assert isinstance(weight, Tensor)
    if weight.is_quantized:
        return f"its weight has the quantized dtype {weight.dtype}"
    if weight.layout is not torch.strided or weight.is_nested:
        return f"its weight has the layout {'nested' if weight.is_nested else weight.layout}"
    if weight.device.type not in DEVICES:
        return f"its weight is on {weight.device.type}, for which embed_ext is not built"
    return None
