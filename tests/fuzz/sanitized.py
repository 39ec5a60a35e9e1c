"""The compiled block index with AddressSanitizer and UndefinedBehaviorSanitizer, for processes that preload them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from services.directory import library
from services.directory.build import INDEX
from services.runtime.shared_library import BUILD, FLAGS

_SANITIZE = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


@dataclass(frozen=True, slots=True)
class _Sanitized:
    source: Path

    def build(self) -> Path:
        target = BUILD / "libkvferry_index.sanitized.so"
        if not target.exists() or target.stat().st_mtime < self.source.stat().st_mtime:
            BUILD.mkdir(exist_ok=True)
            subprocess.run([_compiler(), *FLAGS, *_SANITIZE, str(self.source), "-o", str(target)], check=True)
        return target


def use() -> None:
    """Before anything loads the index."""
    library.INDEX = _Sanitized(INDEX.source)  # type: ignore[assignment]


def environment() -> Mapping[str, str]:
    """Of a process that is to ``use`` it."""
    runtimes = [
        subprocess.run(
            [_compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    # Python leaks on purpose at its end, and what it allocates itself need not be watched for leaks.
    return {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1", "PYTHONMALLOC": "malloc"}  # fmt: skip


def _compiler() -> str:
    return os.environ.get("CC", "gcc")
