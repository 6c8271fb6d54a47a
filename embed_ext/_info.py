"""What was built, and whether it works here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from embed_ext import _C
from embed_ext._version import __version__

OPS = (
    "embedding",
    "embedding_dense_backward",
    "embedding_sparse_backward",
    "embedding_grad_add_",
    "embedding_renorm_",
    "embedding_sgd_",
    "embedding_adagrad_",
    "embedding_adam_",
)


@dataclass(frozen=True)
class BuildInfo:
    """Facts about this build; ``str()`` of it is a short report.

    Attributes:
        version: of embed_ext.
        built_with_torch: the torch it was compiled against.
        torch: the torch that is running.
        compiler: as it names itself.
        cpu_capability: the instruction set in use: portable, avx2 or avx512.
        cuda_archs: GPU architectures in the binary, None in a CPU-only build.
        cuda: the same in words, or why there is no CUDA.
        ops: each op with the devices that have a kernel for it.
    """

    version: str
    built_with_torch: str
    torch: str
    compiler: str
    cpu_capability: str
    cuda_archs: str | None
    cuda: str
    ops: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        lines = [
            f"embed_ext {self.version}",
            f"  torch           {self.torch} (built with {self.built_with_torch})",
            f"  compiler        {self.compiler}",
            f"  CPU capability  {self.cpu_capability}",
            f"  CUDA            {self.cuda}",
        ]
        lines += [f"  {name:<27} {', '.join(devices)}" for name, devices in self.ops.items()]
        return "\n".join(lines)


def _devices(op: str, with_cuda: bool) -> tuple[str, ...]:
    # A CPU-only build registers CUDA kernels that do nothing but say so.
    names = ("CPU", "CUDA", "Meta") if with_cuda else ("CPU", "Meta")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return tuple(name for name in names if has_kernel(f"embed_ext::{op}", name))


def build_info() -> BuildInfo:
    """Return version, compilers, instruction set, GPU architectures and registered ops.

    Example:
        >>> import embed_ext
        >>> embed_ext.build_info().version == embed_ext.__version__
        True
    """
    config = _C.build_config()
    archs = config["cuda_archs"]
    if archs is not None:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU visible"
        cuda = f"archs {archs} ({gpu})"
    elif torch.version.cuda is None:
        cuda = "none: this torch is built without CUDA"
    else:
        cuda = "none: built without a CUDA toolkit, or with EMBED_EXT_CUDA=0"
    return BuildInfo(
        version=__version__,
        built_with_torch=config["torch"],
        torch=torch.__version__,
        compiler=config["compiler"],
        cpu_capability=_C.cpu_capability(),
        cuda_archs=archs,
        cuda=cuda,
        ops={op: _devices(op, archs is not None) for op in OPS},
    )


def self_check(device: str) -> list[str]:
    """Run a lookup and a backward beside ``nn.Embedding``; return what differs, if anything."""
    from embed_ext.modules import Embedding

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=generator).to(device)
    indices = torch.randint(50, (4, 16), generator=generator).to(device)
    grad = torch.randn(4, 16, 8, generator=generator).to(device)
    results = []
    for kind in (nn.Embedding, Embedding):
        module = kind(50, 8, padding_idx=3, _weight=weight.clone())
        out = module(indices)
        out.backward(grad)
        results.append({"forward": out, "backward": module.weight.grad})
    theirs, ours = results
    return [
        f"{device} {name} differs from nn.Embedding's"
        for name in theirs
        if ours[name] is None or not torch.allclose(ours[name], theirs[name], atol=1e-5)
    ]
