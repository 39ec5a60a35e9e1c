"""The libraries that are compared, and how to get those that are not installed."""

from __future__ import annotations

import functools
import subprocess
import sys
from dataclasses import dataclass

_INSTALL = ".venv/bin/pip install -c constraints.txt"


@dataclass(frozen=True, slots=True)
class Library:
    """``module``: what shows whether it is installed, and ``install`` how to get it; empty for what is always there.
    ``spins``: its threads take whole cores even without work."""

    name: str
    module: str = ""
    install: str = ""
    spins: bool = False

    def why_missing(self) -> str:
        return _why_missing(self.module) if self.module else ""


KVFERRY = Library("kvferry")
MEMCPY = Library("memcpy")
# As it comes: a thread that makes progress spins in both processes, beside the loop that asks for the end.
NIXL = Library("NIXL", "nixl_cu13", f"{_INSTALL} nixl-cu13", spins=True)
# That loop makes progress as well.  Without the thread beside it, NIXL is more than twice as fast on two cores.
NIXL_LEAN = Library("NIXL lean", "nixl_cu13", f"{_INSTALL} nixl-cu13", spins=True)
MOONCAKE = Library(
    "Mooncake",
    "mooncake.engine",
    f"{_INSTALL} mooncake-transfer-engine-non-cuda, and on Debian apt-get install libibverbs1 librdmacm1",
)


@functools.cache
def _why_missing(module: str) -> str:
    """The last words of a process that could not import it.  In this one, NIXL's UCX would stay loaded."""
    command = [sys.executable, "-c", f"import {module}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it crashed"])[-1]
