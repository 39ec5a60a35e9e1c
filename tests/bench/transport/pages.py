"""The memory that a pool lies in: pages of 4 KiB or huge ones differ by a tenth."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import numpy as np

from tests.bench.transport.pattern import U8

HUGE = 2 << 20


def private_pool(num_blocks: int, nbytes: int) -> U8:
    """Zeroed memory of this process in huge pages, the best there is, aligned to them.  (numpy's own arrays begin 16
    bytes into a page: copies from there into an aligned pool lose up to half of their speed.)"""
    memory = mmap.mmap(-1, num_blocks * nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    raw = np.frombuffer(memory, dtype=np.uint8)
    begin = -raw.ctypes.data % HUGE
    pool = raw[begin : begin + num_blocks * nbytes].reshape(num_blocks, nbytes)
    pool[:] = 0
    return pool


def kind_of_pages(address: int) -> str:
    """In words: shared or private, and the share in huge pages, of the mapping around ``address`` (proc(5), smaps)."""
    mapping: str | None = None
    sizes_kb: dict[str, int] = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if header := re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+) ", line):
            begin, end, permissions = header.groups()
            inside = int(begin, 16) <= address < int(end, 16)
            mapping = permissions if inside else None
            if inside:
                sharing = "shared" if permissions[3] == "s" else "private"
        elif mapping and line.endswith(" kB"):
            name, size, _ = line.split()
            sizes_kb[name.rstrip(":")] = int(size)
    if sizes_kb["KernelPageSize"] > 4:
        return f"{sharing} memory, pages of {sizes_kb['KernelPageSize']} KiB"
    huge_kb = sum(sizes_kb.get(name, 0) for name in ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped"))
    return f"{sharing} memory, {huge_kb / sizes_kb['Size']:.0%} of it in huge pages"
