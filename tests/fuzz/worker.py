"""One target in a process of its own, under libFuzzer: python -m tests.fuzz.worker MODULE TARGET COUNTS ARGUMENTS

ARGUMENTS are libFuzzer's, and the last is a folder of well-formed inputs, or a file to read alone."""

from __future__ import annotations

import importlib
import logging
import mmap
import os
import resource
import struct
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(
    include=["gateway", "services", "kvferry", "transport", "h11", "h2", "hpack", "tomllib"]
):
    import structlog

    from tests.fuzz import sanitized
    from tests.fuzz.target import Target

    # The others' modules would take their time to be imported and instrumented.
    TARGETS = importlib.import_module(sys.argv[1]).TARGETS

# What grows beyond is a finding.  Not under a sanitizer, which maps terabytes that it never touches.
MEMORY_NBYTES = 4 << 30
# Cases, and those of them that were taken.
COUNTS = struct.Struct("<QQ")
# How often a change keeps an input's outer form, where its target knows one, and how often it is one of a well-formed
# input: libFuzzer keeps the shortest input that reaches an edge, and those are seldom taken.
KEEP_FORM = 0.6
FROM_WHOLE = 0.4


class Counts:
    """In a file, where they outlive the process however it ends."""

    def __init__(self, path: Path) -> None:
        path.write_bytes(COUNTS.pack(0, 0))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), COUNTS.size)
        self._cases = self._taken = 0

    def add(self, taken: bool) -> None:
        self._cases += 1
        self._taken += taken
        COUNTS.pack_into(self._memory, 0, self._cases, self._taken)


def main() -> None:
    _, name, counts_path, *arguments = sys.argv[1:]
    target = next(target for target in TARGETS if target.name == name)
    if "LD_PRELOAD" in os.environ:
        sanitized.use()
    else:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_NBYTES, MEMORY_NBYTES))
    logging.disable()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    warnings.simplefilter("error")
    counts = Counts(Path(counts_path))
    target.read(b"")  # what is made once is made before the clock of the first case runs
    last = Path(arguments[-1])
    files = sorted(last.iterdir()) if last.is_dir() else []
    whole = [data for data in (file.read_bytes() for file in files) if target.read(data)]

    def one(data: bytes) -> None:
        counts.add(target.read(data))

    atheris.Setup([sys.argv[0], *arguments], one, custom_mutator=_mutator(target, whole))
    atheris.Fuzz()


def _mutator(target: Target, whole: Sequence[bytes]) -> Callable[[bytes, int, int], bytes]:
    def mutate(data: bytes, max_nbytes: int, seed: int) -> bytes:
        random = Random(seed)
        if whole and random.random() < FROM_WHOLE:
            data = random.choice(whole)
        if target.mutate is not None and random.random() < KEEP_FORM:
            changed = target.mutate(data, random)
            if changed is not None and len(changed) <= max_nbytes:
                return changed
        return bytes(atheris.Mutate(data, max_nbytes))

    return mutate


if __name__ == "__main__":
    main()
