"""Compiled parts that are one C file each.  The standard library alone: `make setup` runs it, and images before they have
more."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

BUILD = Path(__file__).parents[2] / "build"
FLAGS = ("-std=gnu11", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden", "-shared", "-fPIC")


@dataclass(frozen=True, slots=True)
class SharedLibrary:
    """``what`` it is, in words, with an article; ``links`` are the linker's flags."""

    name: str
    what: str
    source: Path
    links: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """Named after its source and how it is compiled, so that a stale one is never loaded."""
        stamp = f"{FLAGS}{self.source.read_text()}"
        return BUILD / f"libkvferry_{self.name}.{hashlib.sha256(stamp.encode()).hexdigest()[:12]}.so"

    def build(self) -> Path:
        """Compiles unless already done, in a second or so.  RuntimeError says what to do, or has the compiler's words."""
        target = self.path
        if target.exists():
            return target
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            raise RuntimeError(
                f"{self.what} is not compiled and there is no C compiler: apt-get install gcc, then make setup"
            )
        BUILD.mkdir(exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        command = [compiler, *FLAGS, str(self.source), "-o", str(partial), *self.links]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"compiling {self.what} failed:\n{done.stderr.strip()}")
        partial.rename(target)
        return target
