"""Compiles ucp.c against the UCX in use, into build/.  Run by `make setup`: python -m transport.build"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("ucp.c")
BUILD = SOURCE.parent.parent / "build"


def ucx_home() -> Path:
    """Where UCX lies: KVFERRY_UCX_HOME (a prefix with include/ and lib/, such as a system UCX that brings InfiniBand), or
    the libucx wheel.  Raises FileNotFoundError with what to do."""
    if home := os.environ.get("KVFERRY_UCX_HOME"):
        if not list(Path(home).glob("**/libucp.so.0")):
            raise FileNotFoundError(f"KVFERRY_UCX_HOME={home} holds no libucp.so.0; point it at a UCX installation's prefix")
        return Path(home)
    try:
        import libucx
    except ImportError as e:
        raise FileNotFoundError("UCX was not found: pip install libucx-cu13, or set KVFERRY_UCX_HOME to a UCX prefix") from e
    return Path(libucx.__file__).parent


def library_path() -> Path:
    """Names the compiled binding after its source, so that a stale one is never loaded."""
    return BUILD / f"libkvferry_ucp.{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}.so"


def build() -> Path:
    """Compiles unless already done.  Raises RuntimeError with the compiler's words."""
    target = library_path()
    if target.exists():
        return target
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise RuntimeError("no C compiler found: apt-get install gcc, then make setup")
    BUILD.mkdir(exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}")
    command = [compiler, "-O3", "-Wall", "-Wextra", "-Wno-sign-compare", "-shared", "-fPIC", "-pthread",
               f"-I{ucx_home() / 'include'}", str(SOURCE), "-o", str(partial)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"compiling {SOURCE.name} failed:\n{done.stderr.strip()}")
    partial.rename(target)
    return target


if __name__ == "__main__":
    try:
        print(f"UCX binding: {build().name}")
    except (RuntimeError, FileNotFoundError) as e:
        sys.exit(f"kvferry: {e}")
