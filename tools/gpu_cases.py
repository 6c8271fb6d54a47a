"""Run every op once in each of its kernels' ways, small enough for compute-sanitizer.

    compute-sanitizer --tool memcheck python tools/gpu_cases.py --reduced

Results are compared with embed_ext.reference on the CPU; the exit status is 1 if one differs.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator

import torch

import embed_ext
from embed_ext import reference

NUM_ROWS = 37
WIDTHS = (1, 3, 16, 130, 1024)  # from less than one vector a row to several chunks of one
NUM_INDICES = (1, 33, 700)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INDEX_DTYPES = (torch.int64, torch.int32, torch.uint8)
Combination = tuple[int, int, torch.dtype, torch.dtype]  # width, indices, dtype, index dtype

TOLERANCE = 2e-2  # one rounding of a bfloat16 sum; a wrong row is off by far more


def differs(name: str, actual: torch.Tensor, expected: torch.Tensor) -> list[str]:
    """Return one line if the two disagree."""
    actual, expected = (x.to_dense() if x.is_sparse else x for x in (actual.cpu(), expected))
    if torch.allclose(actual.double(), expected.double(), rtol=TOLERANCE, atol=TOLERANCE):
        return []
    return [f"{name}: off by {(actual.double() - expected.double()).abs().max():.3g}"]


def run_case(width: int, count: int, dtype: torch.dtype, index_dtype: torch.dtype) -> list[str]:
    """Run forward, both backwards in both modes, and renorm for one combination."""
    ops = torch.ops.embed_ext
    name = f"width {width}, {count} indices, {dtype}, {index_dtype}"
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(NUM_ROWS, width, generator=generator).to(dtype)
    indices = torch.randint(NUM_ROWS, (count,), generator=generator).to(index_dtype)
    indices[: count // 2] = 5  # a row that many indices share
    grad = torch.randn(count, width, generator=generator).to(dtype)
    on_gpu = [tensor.cuda() for tensor in (weight, indices, grad)]

    found = differs(
        f"embedding: {name}",
        ops.embedding(on_gpu[0], on_gpu[1]),
        reference.embedding(weight, indices),
    )
    for deterministic, scale in itertools.product((False, True), repeat=2):
        torch.use_deterministic_algorithms(deterministic)
        for op in ("embedding_dense_backward", "embedding_sparse_backward"):
            found += differs(
                f"{op}: {name}, deterministic={deterministic}, scale_grad_by_freq={scale}",
                getattr(ops, op)(on_gpu[2], on_gpu[1], NUM_ROWS, 3, scale),
                getattr(reference, op)(grad, indices, NUM_ROWS, 3, scale),
            )
        found += differs(
            f"coalesced: {name}, deterministic={deterministic}, scale_grad_by_freq={scale}",
            ops.embedding_sparse_backward(on_gpu[2], on_gpu[1], NUM_ROWS, 3, scale, True),
            reference.embedding_sparse_backward(grad, indices, NUM_ROWS, 3, scale, True),
        )
        on_device, expected = torch.ones_like(on_gpu[0]), torch.ones_like(weight)
        ops.embedding_grad_add_(on_device, on_gpu[2], on_gpu[1], 3, scale)
        reference.embedding_grad_add_(expected, grad, indices, 3, scale)
        found += differs(
            f"embedding_grad_add_: {name}, deterministic={deterministic}, "
            f"scale_grad_by_freq={scale}",
            on_device,
            expected,
        )
    torch.use_deterministic_algorithms(False)
    ops.embedding_renorm_(on_gpu[0], on_gpu[1], 0.5, 2.0)
    reference.embedding_renorm_(weight, indices, 0.5, 2.0)
    return found + differs(f"embedding_renorm_: {name}", on_gpu[0], weight)


def kept_gradients() -> list[str]:
    """Three steps whose gradients share one memory, the second in two micro-batches."""
    found = []
    for width, dtype in itertools.product(WIDTHS, DTYPES):
        kept = embed_ext.Embedding(NUM_ROWS, width, dtype=dtype, keep_grad_buffer=True).cuda()
        for step, micro_batches in enumerate((1, 2, 1)):
            expected = torch.zeros(NUM_ROWS, width)
            for micro_batch in range(micro_batches):
                generator = torch.Generator().manual_seed(10 * step + micro_batch)
                indices = torch.randint(NUM_ROWS, (20,), generator=generator)
                expected.index_add_(0, indices, torch.ones(20, width))
                kept(indices.cuda()).sum().backward()
            assert kept.weight.grad is not None
            found += differs(
                f"kept gradient: width {width}, {dtype}, step {step}", kept.weight.grad, expected
            )
            kept.weight.grad = None
    return found


def updates() -> list[str]:
    """Each method's step for some rows, by vectors and by elements."""
    ops = torch.ops.embed_ext
    found = []
    for width, dtype, transposed in itertools.product(WIDTHS, DTYPES, (False, True)):
        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(NUM_ROWS, width, generator=generator).to(dtype)
        values = torch.randn(NUM_ROWS // 2, width, generator=generator).to(dtype)
        state = torch.rand(NUM_ROWS, width, generator=generator).to(state_dtype)
        if transposed:
            weight, values, state = (x.t().contiguous().t() for x in (weight, values, state))
        indices, of_row = torch.arange(1, NUM_ROWS, 2), state.sum(1)
        for op, states, options in (
            ("embedding_sgd_", [None], (0.1, 0.03)),
            ("embedding_sgd_", [state], (0.1, 0.0, 0.9, 0.2)),
            ("embedding_adagrad_", [state], (0.1,)),
            ("embedding_adagrad_", [of_row], (0.1, 0.03)),
            ("embedding_adam_", [state, state], (0.1, 0.9, 0.99, 1e-8, 0.03, True, 3)),
            ("embedding_adam_", [state, of_row], (0.1, 0.9, 0.99, 1e-8, 0.03, False, 3)),
        ):
            expected = [x if x is None else x.clone() for x in (weight, *states)]
            actual = [x if x is None else x.clone().cuda() for x in (weight, *states)]
            getattr(reference, op)(*expected, indices, values, *options)
            getattr(ops, op)(*actual, indices.cuda(), values.cuda(), *options)
            for result, wanted in zip(actual, expected, strict=True):
                if result is not None and wanted is not None:
                    name = f"{op}: {len(states)} states, width {width}, {dtype}, {transposed=}"
                    found += differs(name, result, wanted)
            if dtype.itemsize == 2:
                getattr(ops, op)(*actual, indices.cuda(), values.cuda(), *options, seed=1)
    return found


def bad_index_is_reported() -> list[str]:
    """A bad index must raise, and leave a device that still works."""
    weight = torch.randn(NUM_ROWS, 16, device="cuda")
    bad = torch.tensor([1, NUM_ROWS, -1], device="cuda")
    embed_ext.set_index_check("sync")
    try:
        torch.ops.embed_ext.embedding(weight, bad)
    except IndexError:
        pass
    else:
        return ["a bad index raised nothing"]
    finally:
        embed_ext.set_index_check("lazy")
    return differs("after a bad index", weight + 0, weight.cpu())


def combinations(reduced: bool) -> Iterator[Combination]:
    """Every combination; or, since compute-sanitizer slows each launch, one in six of them.

    These have every pair of a width and a dtype, and of a width and a number of indices.
    """
    if not reduced:
        yield from itertools.product(WIDTHS, NUM_INDICES, DTYPES, INDEX_DTYPES)
        return
    index_dtypes = itertools.cycle(INDEX_DTYPES)
    for width in WIDTHS:
        for dtype in DTYPES:
            yield width, max(NUM_INDICES), dtype, next(index_dtypes)
        for count in sorted(NUM_INDICES)[:-1]:
            yield width, count, torch.float32, next(index_dtypes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reduced", action="store_true", help="fewer cases, for compute-sanitizer")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tools/gpu_cases.py needs a CUDA device")
    cases = list(combinations(options.reduced))
    problems = [line for case in cases for line in run_case(*case)]
    problems += kept_gradients()
    problems += updates()
    problems += bad_index_is_reported()
    torch.cuda.synchronize()
    print("\n".join(problems))
    print(f"{len(cases)} cases on {torch.cuda.get_device_name()}, {len(problems)} differ")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
