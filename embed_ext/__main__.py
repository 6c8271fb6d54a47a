"""``python -m embed_ext``: what is installed, and a self-check; exit status 1 if it fails."""

from __future__ import annotations

import sys

import torch

from embed_ext._info import build_info, self_check


def main() -> int:
    """Print the report and the outcome of the self-check."""
    info = build_info()
    print(info)
    with_gpu = info.cuda_archs is not None and torch.cuda.is_available()
    devices = ["cpu", "cuda"] if with_gpu else ["cpu"]
    problems = [problem for device in devices for problem in self_check(device)]
    if problems:
        print("self-check: " + "; ".join(problems))
        return 1
    print(f"self-check: ok ({', '.join(devices)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
