"""What this machine does at most: measured at start, the best of all starts kept on disk."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
from ctypes import byref, c_double
from pathlib import Path

import structlog

from services.engine.kernels.library import KernelsUnavailable, instruction_sets, load
from services.engine.kernels.packed import FORMATS
from services.engine.phases import Ceilings

log = structlog.get_logger(__name__)

# More than caches hold: with 64 MiB two threads seemed to read 185 GB/s where memory gave them 80.
MEMORY_NBYTES = 256 << 20
MEASURE_S = 0.08
_FILE = "ceilings.json"
_CPU_LINES = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part")


def measure(dtype: str, num_threads: int) -> Ceilings:
    """Of ``num_threads`` threads where the caller may run, itself among them: products of ``dtype`` (float32's for one that
    the kernels have not) by the instructions that the kernels use, and reading memory.  Blocks for a tenth of a second or
    two.  Raises KernelsUnavailable."""
    flops_per_s, bytes_per_s = c_double(), c_double()
    measured = load().kvf_measure_peaks(
        instruction_sets()[0].encode(), FORMATS.get(dtype, FORMATS["float32"]), num_threads,
        MEMORY_NBYTES, MEASURE_S, byref(flops_per_s), byref(bytes_per_s),
    )  # fmt: skip
    if measured:
        raise KernelsUnavailable(f"no memory, or no {num_threads} threads, to measure what the processor does at most")
    return Ceilings(flops_per_s.value, bytes_per_s.value)


def highest(dtype: str, num_threads: int, folder: Path | None) -> Ceilings:
    """As ``measure``, or what an earlier start measured on this kind of processor if that was more: others may have been
    computing now.  ``folder`` keeps it; None keeps nothing.  Raises KernelsUnavailable."""
    now = measure(dtype, num_threads)
    if folder is None:
        return now
    name = f"{_processor()}, {instruction_sets()[0]}, {dtype}, {num_threads} threads, {MEMORY_NBYTES >> 20} MiB"
    path = folder / _FILE
    known = _read(path)
    before = known.get(name, [0.0, 0.0])
    best = Ceilings(max(now.flops_per_s, before[0]), max(now.bytes_per_s, before[1]))
    if [best.flops_per_s, best.bytes_per_s] != before:
        _write(path, {**known, name: [best.flops_per_s, best.bytes_per_s]})
    return best


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return platform.machine()
    found: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in _CPU_LINES:
            found[key.strip()] = value.strip()
    return " ".join([platform.machine(), *(found[key] for key in _CPU_LINES if key in found)])


def _read(path: Path) -> dict[str, list[float]]:
    """What was there; nothing where that is damaged."""
    try:
        content = json.loads(path.read_text())
        return {str(name): [float(rates[0]), float(rates[1])] for name, rates in content.items()}
    except (OSError, ValueError, AttributeError, TypeError, IndexError, KeyError):
        return {}


def _write(path: Path, content: dict[str, list[float]]) -> None:
    """Whole or not at all.  Of two at once, one is lost until its next start; a disk that is full loses both."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=_FILE)
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump(content, file, indent=1)
            Path(temporary).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
            raise
    except OSError as error:
        log.warning("ceilings_not_kept", path=str(path), error=str(error))
