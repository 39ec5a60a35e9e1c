"""Which processors a thread may run on (sched_setaffinity(2): what a thread starts inherits its set)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_MAX_CPU = 4095

Cpus = frozenset[int]


def parse_cpus(text: str) -> Cpus:
    """ "0-3,6" as a set; "" is empty.  Raises ValueError with a sentence for anything else."""
    cpus: set[int] = set()
    for part in text.split(",") if text else ():
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last > _MAX_CPU:
            raise ValueError(f"{text!r} is not a list of processors; write it like 0-3,6")
        cpus |= set(range(first, last + 1))
    return frozenset(cpus)


def require_allowed(cpus: Cpus) -> None:
    """Raises ValueError with a sentence when the calling thread may not use some of them."""
    allowed = os.sched_getaffinity(0)
    if missing := cpus - allowed:
        raise ValueError(
            f"there is no processor {format_cpus(missing)} here; this process may use {format_cpus(allowed)}"
        )


def format_cpus(cpus: set[int] | Cpus) -> str:
    """The inverse of ``parse_cpus``, as short as can be."""
    ranges: list[list[int]] = []
    for cpu in sorted(cpus):
        if ranges and ranges[-1][1] == cpu - 1:
            ranges[-1][1] = cpu
        else:
            ranges.append([cpu, cpu])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in ranges)


@contextmanager
def pinned(cpus: Cpus) -> Iterator[None]:
    """The calling thread, and what it starts meanwhile, on ``cpus`` alone; an empty set changes nothing."""
    if not cpus:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def leave(cpus: Cpus) -> None:
    """Sends the calling thread, and what it starts from now on, to the processors beside ``cpus``, where there are any."""
    if cpus and (others := os.sched_getaffinity(0) - cpus):
        os.sched_setaffinity(0, others)
