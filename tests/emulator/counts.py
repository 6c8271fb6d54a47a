"""What launches ask of the memory of the emulated device: counted, not timed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.emulator import control

SECTOR_BYTES = 32
# Those that are no kernels of ours.
FILL, SORT, SCAN, SELECT = "memset", "cub sort", "cub scan", "cub select"


@dataclass(frozen=True)
class LaunchCounts:
    """What one launch did. A library's is known by its name, and nothing else is known of it.

    A warp's accesses by one instruction count together: the sectors that they touch, each once.
    """

    kernel: str
    blocks: int
    threads: int  # of a block
    read_sectors: int
    written_sectors: int
    added_sectors: int  # by atomics and reductions
    sectors_read_by_block: int  # each once a block, as if its L1 cache kept all
    unique_read_sectors: int  # each once a launch
    unique_written_sectors: int  # the same, written or added to
    adds: int  # atomics and reductions that lanes have sent
    longest: int  # the most accesses of one lane
    longest_reads: int  # the most of one lane that return something to wait for

    @property
    def is_library(self) -> bool:
        return self.kernel in (SORT, SCAN, SELECT)

    @property
    def requested_bytes(self) -> int:
        return SECTOR_BYTES * (self.read_sectors + self.written_sectors + self.added_sectors)

    @property
    def fetched_bytes(self) -> int:
        """The same, but what a block reads again costs nothing."""
        sectors = self.sectors_read_by_block + self.written_sectors + self.added_sectors
        return SECTOR_BYTES * sectors


def _taken() -> list[LaunchCounts]:
    library = control.library()
    needed = library.emulator_counts(None, 0)
    buffer = ctypes.create_string_buffer(needed)
    library.emulator_counts(buffer, needed)
    lines = [line.split("\t") for line in buffer.value.decode().splitlines()]
    return [LaunchCounts(name, *map(int, figures)) for name, *figures in lines]


@contextmanager
def counted() -> Iterator[list[LaunchCounts]]:
    """Counts what is launched within; the list is filled at the end. Everything runs in order."""
    control.set_seed(0)
    control.library().emulator_count(True)
    launches: list[LaunchCounts] = []
    try:
        yield launches
        launches += _taken()
    finally:
        control.library().emulator_count(False)
