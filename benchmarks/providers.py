"""Who is measured: each provider builds a lookup over a given table.

To add one, write a function ``build(weight, padding_idx) -> Lookup`` and register it::

    register(Provider("mine", "my lookup", build, gradient="dense", unavailable=needs("mine")))
"""

from __future__ import annotations

import importlib
import importlib.metadata
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks import rivals
from benchmarks.lookup import Build
from benchmarks.lookup import Lookup as Lookup
from benchmarks.lookup import needs as needs
from benchmarks.record import ProviderRecord

BASELINE = "nn.Embedding"
SUBJECT = "embed_ext"
KEPT = "embed_ext-kept"


def _always_available() -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """How to build a lookup, and what a reader must know to compare it fairly."""

    name: str
    description: str
    build: Build
    gradient: Literal["dense", "sparse"] = "dense"
    padding: bool = True  # whether padding_idx is understood
    default: bool = True  # measured unless --providers says otherwise
    compiles: bool = False  # whether the first call of each shape compiles
    # Whether torch.use_deterministic_algorithms is on; it is then timed in modes with a backward.
    deterministic: bool = False
    unavailable: Callable[[], str | None] = _always_available  # why it cannot run here
    package: str = "torch"  # whose version is recorded

    def version(self) -> str | None:
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            module_version = getattr(importlib.import_module(self.package), "__version__", None)
            return None if module_version is None else str(module_version)

    def record(self, unavailable: str | None) -> ProviderRecord:
        return ProviderRecord(
            name=self.name,
            description=self.description,
            gradient=self.gradient,
            package=self.package,
            version=self.version() if unavailable is None else None,
            unavailable=unavailable,
        )


_REGISTRY: dict[str, Provider] = {}


def register(provider: Provider) -> Provider:
    if provider.name in _REGISTRY:
        raise ValueError(f"a provider named {provider.name!r} is registered already")
    _REGISTRY[provider.name] = provider
    return provider


def all_providers() -> list[Provider]:
    return list(_REGISTRY.values())


def get_provider(name: str) -> Provider:
    try:
        return _REGISTRY[name]
    except KeyError:
        raise ValueError(f"no provider {name!r}; there are: {', '.join(_REGISTRY)}") from None


def select_providers(names: Sequence[str]) -> list[Provider]:
    """The named providers, the default ones if there are no names, every one for ``all``.

    The baseline always comes with them, because every ratio is to it.
    """
    if "all" in names:
        return all_providers()
    if not names:
        return [provider for provider in all_providers() if provider.default]
    return [get_provider(name) for name in dict.fromkeys([BASELINE, *names])]


def _from_module(
    module: Callable[[], type[nn.Embedding]], *, sparse: bool = False, compiled: bool = False
) -> Build:
    def build(weight: Tensor, padding_idx: int | None) -> Lookup:
        # from_pretrained shares the table's memory, so that no provider has luckier pages.
        embedding = module().from_pretrained(  # type: ignore[no-untyped-call]
            weight, freeze=False, padding_idx=padding_idx, sparse=sparse
        )
        call = torch.compile(embedding, fullgraph=True, dynamic=False) if compiled else embedding
        return Lookup(call, embedding.weight)

    return build


def _embed_ext_kept(weight: Tensor, padding_idx: int | None) -> Lookup:
    embedding = _embed_ext().from_pretrained(  # type: ignore[no-untyped-call]
        weight, freeze=False, padding_idx=padding_idx
    )
    embedding.keep_grad_buffer = True
    return Lookup(embedding, embedding.weight)


def _from_function(function: Callable[[Tensor, Tensor], Tensor]) -> Build:
    def build(weight: Tensor, padding_idx: int | None) -> Lookup:
        parameter = nn.Parameter(weight)
        return Lookup(lambda indices: function(parameter, indices), parameter)

    return build


def _embed_ext() -> type[nn.Embedding]:
    module: type[nn.Embedding] = importlib.import_module("embed_ext").Embedding
    return module


def _compiler_missing() -> str | None:
    if torch.cuda.is_available():
        return needs("triton")()
    if shutil.which("c++") or shutil.which("g++"):
        return None
    return "torch.compile needs a C++ compiler, and neither c++ nor g++ is on the PATH"


register(
    Provider(
        SUBJECT,
        "embed_ext.Embedding",
        _from_module(_embed_ext),
        unavailable=needs("embed_ext"),
        package="embed_ext",
    )
)
register(Provider(BASELINE, "torch.nn.Embedding", _from_module(lambda: nn.Embedding)))
register(
    Provider(
        "embed_ext-sparse",
        "embed_ext.Embedding(sparse=True)",
        _from_module(_embed_ext, sparse=True),
        gradient="sparse",
        default=False,
        unavailable=needs("embed_ext"),
        package="embed_ext",
    )
)
register(
    Provider(
        "nn.Embedding-sparse",
        "torch.nn.Embedding(sparse=True)",
        _from_module(lambda: nn.Embedding, sparse=True),
        gradient="sparse",
    )
)
register(
    Provider(
        "index_select",
        "weight.index_select(0, indices); its backward is index_add_",
        _from_function(lambda weight, indices: weight.index_select(0, indices)),
        padding=False,
    )
)
register(
    Provider(
        "indexing",
        "weight[indices]; its backward is index_put_(accumulate=True)",
        _from_function(lambda weight, indices: weight[indices]),
        padding=False,
    )
)
register(
    Provider(
        KEPT,
        "embed_ext.Embedding(keep_grad_buffer=True)",
        _embed_ext_kept,
        default=False,
        unavailable=needs("embed_ext"),
        package="embed_ext",
    )
)
register(
    Provider(
        "fbgemm",
        "fbgemm_gpu.DenseTableBatchedEmbeddingBagsCodegen, PoolingMode.NONE",
        rivals.fbgemm,
        padding=False,
        default=False,
        unavailable=needs("fbgemm_gpu"),
        package=rivals.installed("fbgemm_gpu-cpu", "fbgemm_gpu"),
    )
)
register(
    Provider(
        "liger",
        "liger_kernel's LigerEmbeddingFunction: Triton, atomic adds",
        rivals.liger,
        padding=False,
        default=False,
        unavailable=rivals.liger_missing,
        package="liger_kernel",
    )
)
register(
    Provider(
        "torch.compile",
        "torch.compile(nn.Embedding, fullgraph=True); compiles for each shape, so slow to start",
        _from_module(lambda: nn.Embedding, compiled=True),
        default=False,
        compiles=True,
        unavailable=_compiler_missing,
    )
)
register(
    Provider(
        "embed_ext-deterministic",
        "embed_ext.Embedding under torch.use_deterministic_algorithms(True)",
        _from_module(_embed_ext),
        default=False,
        deterministic=True,
        unavailable=needs("embed_ext"),
        package="embed_ext",
    )
)
register(
    Provider(
        "nn.Embedding-deterministic",
        "torch.nn.Embedding under torch.use_deterministic_algorithms(True)",
        _from_module(lambda: nn.Embedding),
        default=False,
        deterministic=True,
    )
)
