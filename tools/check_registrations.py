"""Check that every op of the embed_ext namespace has a kernel for the dispatch keys given.

python tools/check_registrations.py CPU Meta CUDA
"""

from __future__ import annotations

import sys

import torch

import embed_ext


def missing_kernels(keys: list[str]) -> list[str]:
    """Return "op: key" for each op without a kernel of its own for a key."""
    ops = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("embed_ext::")]
    if not ops:
        raise SystemExit("no op is registered in the embed_ext namespace")
    print(f"{len(ops)} ops: {', '.join(sorted(ops))}")
    if "CUDA" in keys and embed_ext.build_info().cuda_archs is None:
        # Its CUDA kernels only say that there are none.
        raise SystemExit("this is a CPU-only build")
    return [
        f"{op}: no {key} kernel"
        for op in sorted(ops)
        for key in keys
        if not torch._C._dispatch_has_kernel_for_dispatch_key(op, key)
    ]


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    missing = missing_kernels(sys.argv[1:])
    print("\n".join(missing or [f"each has its kernels for {', '.join(sys.argv[1:])}"]))
    sys.exit(1 if missing else 0)
