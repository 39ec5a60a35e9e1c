"""Compiles the kernels; step.c, draw.c and peak.c once for each instruction set, into build/.  Run by `make setup`:
python -m services.engine.kernels.build"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

HERE = Path(__file__).parent
SOURCES = tuple(sorted((*HERE.glob("*.c"), *HERE.glob("*.h"))))
BUILD = HERE.parents[2] / "build"

_FLAGS = ("-std=gnu11", "-O3", "-Wall", "-Wextra", "-Wno-sign-compare", "-fPIC", "-fno-strict-aliasing", "-pthread")
_ONCE = ("pool", "kernels", "steps", "quantize", "peaks")
_VARIANTS = {
    "avx512bf16": ("-march=x86-64-v4", "-mprefer-vector-width=512", "-mavx512bf16", "-mavx512vnni"),
    "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "avx2": ("-march=x86-64-v3",),
    "portable": (),
}


def library_path() -> Path:
    """Names the library after its source and how it is compiled, so that a stale one is never loaded."""
    stamp = f"{[source.read_text() for source in SOURCES]}{_FLAGS}{_VARIANTS}"
    return BUILD / f"libkvferry_kernels.{hashlib.sha256(stamp.encode()).hexdigest()[:12]}.so"


def build() -> Path:
    """Compiles unless already done, in about 20 seconds.  Raises RuntimeError with what to do, or the compiler's words."""
    target = library_path()
    if target.exists():
        return target
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise RuntimeError("no C compiler found: apt-get install gcc, then make setup")
    log.info("compiling_kernels", library=target.name)  # a worker that starts shows what it waits for
    variants = _VARIANTS if platform.machine() == "x86_64" else {"portable": ()}
    BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        units: dict[str, tuple[str, tuple[str, ...]]] = {name: (f"{name}.c", ()) for name in _ONCE}
        for name, flags in variants.items():
            units[f"step_{name}"] = ("step.c", (*flags, f"-DKVF_STEP=kvf_step_{name}"))
            units[f"draw_{name}"] = ("draw.c", (*flags, "-ffp-contract=off", f"-DKVF_DRAW=kvf_draw_{name}"))
            units[f"peak_{name}"] = ("peak.c", (*flags, f"-DKVF_PEAK=kvf_peak_{name}"))
        objects = [f"{folder}/{name}.o" for name in units]
        commands = [
            [compiler, *_FLAGS, *flags, "-c", str(HERE / source), "-o", object_]
            for (source, flags), object_ in zip(units.values(), objects, strict=True)
        ]
        _run_all(commands)
        partial = f"{folder}/partial.so"
        _run_all([[compiler, "-shared", "-pthread", *objects, "-lm", "-o", partial]])
        Path(partial).rename(target)
    return target


def _run_all(commands: list[list[str]]) -> None:
    """At the same time."""
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [process.communicate()[1] for process in running]
    for process, error in zip(running, errors, strict=True):
        if process.returncode != 0:
            raise RuntimeError(f"compiling the kernels failed:\n{error.strip()}")


if __name__ == "__main__":
    try:
        print(f"CPU kernels: {build().name}")
    except RuntimeError as e:
        sys.exit(f"kvferry: {e}")
