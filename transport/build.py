"""Compiles the C files here against the UCX in use, into build/.  Run by `make setup`: python -m transport.build"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = tuple(HERE / name for name in ("ferry.c", "ferry.h", "ucp.c", "copy.c", "copy.h"))
BUILD = HERE.parent / "build"
FLAGS = (
    "-std=gnu11", "-O3", "-Wall", "-Wextra", "-Wno-sign-compare", "-fvisibility=hidden", "-shared", "-fPIC", "-pthread"
)  # fmt: skip


def ucx_home() -> Path:
    """Where UCX lies: KVFERRY_UCX_HOME (a prefix with include/ and lib/, such as a system UCX that brings InfiniBand), or
    the libucx wheel.  Raises FileNotFoundError with what to do."""
    if home := os.environ.get("KVFERRY_UCX_HOME"):
        return Path(home)
    # Found without importing it: its package would load a second copy of the libraries into this process.
    spec = importlib.util.find_spec("libucx")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("UCX was not found: pip install libucx-cu13, or set KVFERRY_UCX_HOME to a UCX prefix")
    return Path(spec.origin).parent


def ucx_libraries() -> Path:
    """The directory with libucp.so.0.  Raises FileNotFoundError with what to do."""
    home = ucx_home()
    for name in ("lib", "lib64", f"lib/{sysconfig.get_config_var('MULTIARCH')}"):
        if (home / name / "libucp.so.0").exists():
            return home / name
    raise FileNotFoundError(f"no libucp.so.0 under {home}: point KVFERRY_UCX_HOME at a UCX installation's prefix")


def library_path() -> Path:
    """Names the compiled binding after its source and the UCX it is linked with, so that a stale one is never loaded.
    By what UCX's file holds: its date is another one in an image that was pulled."""
    ucp = ucx_libraries() / "libucp.so.0"
    content = hashlib.sha256(ucp.read_bytes()).hexdigest()
    stamp = f"{FLAGS}{[source.read_text() for source in SOURCES]}{ucp}{content}"
    return BUILD / f"libkvferry_ucp.{hashlib.sha256(stamp.encode()).hexdigest()[:12]}.so"


def build() -> Path:
    """Compiles unless already done.  Raises FileNotFoundError (no UCX) or RuntimeError with the compiler's words."""
    target = library_path()
    if target.exists():
        return target
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise RuntimeError("no C compiler found: apt-get install gcc, then make setup")
    BUILD.mkdir(exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}")
    libraries = ucx_libraries()
    # By soname and rpath: the wheel holds libucp.so and libucp.so.0 as two files, and loading both crashes at exit.
    command = [
        compiler, *FLAGS, f"-I{ucx_home() / 'include'}",
        *(str(source) for source in SOURCES if source.suffix == ".c"), "-o", str(partial),
        f"-L{libraries}", "-l:libucp.so.0", "-l:libucs.so.0", f"-Wl,-rpath,{libraries}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"compiling the UCX binding failed:\n{done.stderr.strip()}")
    partial.rename(target)
    return target


if __name__ == "__main__":
    try:
        print(f"UCX binding: {build().name}")
    except (RuntimeError, FileNotFoundError) as e:
        sys.exit(f"kvferry: {e}")
