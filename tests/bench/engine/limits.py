"""What the machine can do: bytes read from memory, in order and as KV blocks lie, and the rate of torch's matmul."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

SOURCE = """
#include <pthread.h>
#include <stdint.h>

typedef struct { const char *from; const int64_t *at; int64_t count, nbytes; uint64_t sum; } share;

static void *add(void *argument)
{
    share *s = argument;
    typedef uint64_t wide __attribute__((vector_size(64)));
    wide a = {0}, b = {0};
    for (int64_t i = 0; i < s->count; i++) {
        const wide *p = (const wide *)(s->from + s->at[i]);
        for (int64_t k = 0; k < s->nbytes / 64; k += 2) a += p[k], b += p[k + 1];
    }
    a += b;
    for (int i = 0; i < 8; i++) s->sum += a[i];
    return 0;
}

/* Adds up count pieces of nbytes (a multiple of 128) each, on as many threads. */
void read_pieces(const char *from, const int64_t *at, int64_t count, int64_t nbytes, int threads)
{
    pthread_t others[64];
    share shares[64];
    for (int i = 0; i < threads; i++) {
        int64_t begin = count * i / threads, end = count * (i + 1) / threads;
        shares[i] = (share){from, at + begin, end - begin, nbytes, 0};
        if (i) pthread_create(&others[i], 0, add, &shares[i]);
    }
    add(&shares[0]);
    for (int i = 1; i < threads; i++) pthread_join(others[i], 0);
}
"""


class Memory:
    """A pool, and how fast its bytes are read."""

    def __init__(self, nbytes: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder) / "read.c", Path(folder) / "read.so"
            source.write_text(SOURCE)
            command = ["gcc", "-O3", "-march=native", "-shared", "-fPIC", "-pthread", str(source), "-o", str(library)]
            subprocess.run(command, check=True)
            self._read = ctypes.CDLL(str(library)).read_pieces
        self.pool = large_pages(nbytes)
        self._from = ctypes.addressof(ctypes.c_char.from_buffer(self.pool))

    def read(self, offsets: np.ndarray, piece_nbytes: int, threads: int) -> float:
        """Seconds."""
        offsets = np.ascontiguousarray(offsets, np.int64)
        began = time.perf_counter()
        self._read(
            ctypes.c_void_p(self._from),
            ctypes.c_void_p(offsets.ctypes.data),
            ctypes.c_int64(len(offsets)),
            ctypes.c_int64(piece_nbytes),
            ctypes.c_int(threads),
        )
        return time.perf_counter() - began


def large_pages(nbytes: int) -> mmap.mmap:
    """Memory of which every page is there, as a worker's pool."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    np.frombuffer(memory, dtype=np.uint8)[:] = 0
    return memory


def matmul_seconds(rows: int, inputs: int, outputs: int, dtype: torch.dtype, threads: int) -> float:
    torch.set_num_threads(threads)
    x, weight = torch.ones(rows, inputs, dtype=dtype), torch.ones(outputs, inputs, dtype=dtype)
    torch.nn.functional.linear(x, weight)
    began = time.perf_counter()
    torch.nn.functional.linear(x, weight)
    return time.perf_counter() - began
