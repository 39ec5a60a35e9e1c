"""Copies past the cache: each of the ways that one processor or another would choose, against plain ones."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

SOURCE = Path(__file__).parents[2] / "transport" / "copy.c"
ROOM = 1 << 16
FLAGS = Path("/proc/cpuinfo").read_text().split()

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere copies are memcpy's")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """copy.c with its way of copying named by the caller."""
    folder = tmp_path_factory.mktemp("copy")
    shim = folder / "shim.c"
    shim.write_text(
        f'#include "{SOURCE}"\n'
        "static stream_t *ways[] = {stream_avx512, stream_avx2, stream_sse2};\n"
        "void copy_by(int way, char *to, const char *from, size_t n) { copy_by_lanes(ways[way], to, from, n); }\n"
    )
    compiler = os.environ.get("CC", "gcc")
    subprocess.run([compiler, "-O3", "-shared", "-fPIC", shim, "-o", folder / "shim.so"], check=True)
    lib = ctypes.CDLL(str(folder / "shim.so"))
    lib.copy_by.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    lib.copy_by.restype = None
    return lib


@pytest.mark.parametrize(("way", "flag"), [(0, "avx512f"), (1, "avx2"), (2, "sse2")], ids=["avx512", "avx2", "sse2"])
def test_every_byte_of_the_range_is_copied_and_none_besides(library: ctypes.CDLL, way: int, flag: str) -> None:
    if flag not in FLAGS:
        pytest.skip(f"this processor has no {flag}")
    source = np.random.default_rng(3).integers(1, 256, ROOM, np.uint8)

    @given(to=st.integers(0, 200), start=st.integers(0, 200), n=st.integers(0, 2000) | st.integers(0, ROOM - 200))
    @settings(max_examples=300)
    def holds(to: int, start: int, n: int) -> None:
        target = np.zeros(ROOM + 64, np.uint8)
        library.copy_by(way, target.ctypes.data + to, source.ctypes.data + start, n)
        expected = np.zeros_like(target)
        expected[to : to + n] = source[start : start + n]
        assert np.array_equal(target, expected)

    holds()
