"""Compiles the fleet simulator into build/.  Run by `make setup`: python -m services.planner.build"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("fleet.c")
BUILD = Path(__file__).parents[2] / "build"
FLAGS = ("-std=gnu11", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden", "-shared", "-fPIC")


def library_path() -> Path:
    """Names the library after its source and how it is compiled, so that a stale one is never loaded."""
    stamp = f"{FLAGS}{SOURCE.read_text()}"
    return BUILD / f"libkvferry_fleet.{hashlib.sha256(stamp.encode()).hexdigest()[:12]}.so"


def build() -> Path:
    """Compiles unless already done, in about a second.  Raises RuntimeError with what to do, or the compiler's words."""
    target = library_path()
    if target.exists():
        return target
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise RuntimeError(
            "the fleet simulator is not compiled and there is no C compiler: apt-get install gcc, then make setup"
        )
    BUILD.mkdir(exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}")
    command = [compiler, *FLAGS, str(SOURCE), "-o", str(partial), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"compiling the fleet simulator failed:\n{done.stderr.strip()}")
    partial.rename(target)
    return target


if __name__ == "__main__":
    try:
        print(f"fleet simulator: {build().name}")
    except RuntimeError as e:
        sys.exit(f"kvferry: {e}")
