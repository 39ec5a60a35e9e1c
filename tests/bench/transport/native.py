"""native.c, compiled into build/ and called without the GIL."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
from ctypes import c_uint64, c_void_p
from pathlib import Path

from tests.bench.transport.pattern import U64

SOURCE = Path(__file__).with_name("native.c")
BUILD = SOURCE.parents[3] / "build" / "bench"


def scattered_copy(to: int, source: int, to_offsets: U64, source_offsets: U64, nbytes: int) -> None:
    """memcpy of one block after the other; offsets in bytes."""
    pointers = (c_void_p(a.ctypes.data) for a in (to_offsets, source_offsets))
    load().scattered(c_void_p(to), c_void_p(source), *pointers, c_uint64(len(to_offsets)), c_uint64(nbytes))


def watch(address: int, value: int, timeout_s: float) -> int:
    """When the eight bytes at ``address`` were first seen to hold ``value``, on time.monotonic_ns's clock; spins.
    Raises TimeoutError."""
    seen: int = load().watch(c_void_p(address), c_uint64(value), c_uint64(int(timeout_s * 1e9)))
    if not seen:
        raise TimeoutError(f"the block did not arrive within {timeout_s} s")
    return seen


@functools.cache
def load() -> ctypes.CDLL:
    target = BUILD / f"native.{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}.so"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        subprocess.run(["gcc", "-std=gnu11", "-O3", "-shared", "-fPIC", str(SOURCE), "-o", str(partial)], check=True)
        partial.rename(target)
    library = ctypes.CDLL(str(target))
    library.scattered.restype, library.watch.restype = None, c_uint64
    return library
