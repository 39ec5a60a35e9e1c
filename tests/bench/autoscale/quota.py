"""Processes that get a part of a processor and no more, by Linux' control groups; wants root.

Workers that share cores lend each other what they do not need, so that every split of them is as good: only with a part of
its own does one stand for a machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
# Short, so that all steps take longer by the same factor; a part must be 1 ms at least.
PERIOD_US = 5000


class NoQuota(Exception):
    """It cannot be had here; says why."""


@contextmanager
def limited(pids: Sequence[int], cores: float) -> Iterator[None]:
    """Each of these processes gets ``cores``, and afterwards goes on without a limit.  Raises NoQuota.  Seen to work with
    version 1 of control groups; with version 2 it was never run."""
    old = ROOT / "cpu"  # version 1 of control groups has a tree for each resource
    folder = old if (old / "cpu.cfs_quota_us").exists() else ROOT
    groups = [folder / f"kvferry-bench-{os.getpid()}-{pid}" for pid in pids]
    quota_us = round(cores * PERIOD_US)
    settings = (
        {"cpu.cfs_period_us": f"{PERIOD_US}", "cpu.cfs_quota_us": f"{quota_us}"}
        if folder is old
        else {"cpu.max": f"{quota_us} {PERIOD_US}"}
    )
    made: list[Path] = []
    try:
        if folder is ROOT:
            (ROOT / "cgroup.subtree_control").write_text("+cpu")
        for group, pid in zip(groups, pids, strict=True):
            group.mkdir()
            made.append(group)
            for name, value in {**settings, "cgroup.procs": str(pid)}.items():
                (group / name).write_text(value)
    except OSError as error:
        _remove(folder, made)
        raise NoQuota(f"no control group for the processor can be made under {folder}: {error.strerror}") from error
    try:
        yield
    finally:
        _remove(folder, made)


def _remove(folder: Path, groups: Sequence[Path]) -> None:
    for group in groups:
        for pid in (group / "cgroup.procs").read_text().split():
            (folder / "cgroup.procs").write_text(pid)
        group.rmdir()
