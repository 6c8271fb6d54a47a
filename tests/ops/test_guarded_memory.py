"""Nothing is read beyond the last byte of an argument, not even to fetch ahead.

Each argument ends where memory begins that cannot be read: a process that does dies.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.common import run_python

GUARDED = f"""
import ctypes, itertools, mmap, sys, torch, embed_ext
from dataclasses import replace
sys.path.append({str(Path(__file__).resolve().parents[2])!r})
from tests.common import REAL_DTYPES, assert_same_bits, make_indices, make_table
from tests.ops.updates import METHODS, make_update

libc, ops, maps = ctypes.CDLL(None), torch.ops.embed_ext, []


def guarded(tensor):
    size, page = tensor.nbytes, mmap.PAGESIZE
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    maps.append(memory)
    guard = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * page
    assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
    flat = torch.frombuffer(
        memory, dtype=tensor.dtype, count=tensor.numel(), offset=pages * page - size
    )
    return flat.view(tensor.shape).copy_(tensor)


for dtype in REAL_DTYPES:
    for width in (1, 3, 8, 16, 33, 130):
        for count in (1, 15, 16, 17, 47, 48, 1025):
            weight, grad = make_table(50, width, dtype), make_table(count, width, dtype, seed=2)
            for index_dtype in (torch.int32, torch.int64):
                indices = make_indices((count,), 50, index_dtype)
                indices[-1] = 49
                at_the_end = guarded(indices)
                assert_same_bits(
                    ops.embedding(guarded(weight), at_the_end), ops.embedding(weight, indices)
                )
                for scale in (False, True):
                    assert_same_bits(
                        ops.embedding_dense_backward(guarded(grad), at_the_end, 50, -1, scale),
                        ops.embedding_dense_backward(grad, indices, 50, -1, scale),
                    )
                    actual, expected = guarded(weight), weight.clone()
                    ops.embedding_grad_add_(actual, guarded(grad), at_the_end, -1, scale)
                    ops.embedding_grad_add_(expected, grad, indices, -1, scale)
                    assert_same_bits(actual, expected)
                actual, expected = guarded(weight), weight.clone()
                ops.embedding_renorm_(actual, at_the_end, 0.5)
                ops.embedding_renorm_(expected, indices, 0.5)
                assert_same_bits(actual, expected)

for dtype in REAL_DTYPES:
    for width, count, name in itertools.product((1, 16, 33, 130), (1, 17, 50), METHODS):
        update = make_update(METHODS[name], 50, width, count, dtype)
        at_the_end = update.map(guarded)
        at_the_end = replace(at_the_end, indices=guarded(update.indices))
        for actual, expected in zip(at_the_end.run(), update.run(), strict=True):
            assert_same_bits(actual, expected)
        entries = make_indices((2 * count,), 50)
        entries[-1] = 49
        values = make_table(2 * count, width, dtype, seed=5)
        update = make_update(METHODS[name], 50, width, 0, dtype)
        update = replace(update, indices=entries, values=values)
        at_the_end = replace(update.map(guarded), indices=guarded(entries))
        results = at_the_end.run(coalesced=False), update.run(coalesced=False)
        for actual, expected in zip(*results, strict=True):
            assert_same_bits(actual, expected)

# An output that is streamed.
weight, indices = make_table(50, 512), make_indices((9001,), 50)
indices[-1] = 49
assert_same_bits(
    ops.embedding(guarded(weight), guarded(indices)), ops.embedding(weight, indices)
)
print("read nothing else")
"""


@pytest.mark.parametrize("capability", ["portable", "avx2", "avx512"])
def test_arguments_at_the_end_of_memory(capability: str) -> None:
    result = run_python(GUARDED, EMBED_EXT_CPU_CAPABILITY=capability)
    if "this machine supports at most" in result.stderr:
        pytest.skip(f"this machine's CPU has no {capability}")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "read nothing else\n"
