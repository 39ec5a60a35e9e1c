"""Names a process so that a neighbour on the same host can prove its end (proc(5))."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from kvferry.api.directory.v1 import directory_pb2


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """One process, for as long as its host is up.  ``start_time_ticks``: clock ticks since boot, which tells a process
    from a later one with the same pid.  Comparable only within one boot and one PID namespace."""

    boot_id: str
    pid_namespace: int
    pid: int
    start_time_ticks: int

    def to_proto(self) -> directory_pb2.ProcessIdentity:
        return directory_pb2.ProcessIdentity(
            boot_id=self.boot_id,
            pid_namespace=self.pid_namespace,
            pid=self.pid,
            start_time_ticks=self.start_time_ticks,
        )

    @classmethod
    def from_proto(cls, message: directory_pb2.ProcessIdentity) -> ProcessIdentity:
        return cls(message.boot_id, message.pid_namespace, message.pid, message.start_time_ticks)


def this_process() -> ProcessIdentity:
    pid = os.getpid()
    return ProcessIdentity(_boot_id(), _pid_namespace(), pid, _stat(pid)[1])


def has_ended(identity: ProcessIdentity) -> bool | None:
    """True only with proof that no thread of the process runs any more: it is gone, it is a zombie without other
    threads, or its pid belongs to a process that started at another time.  False while it runs.  None when that cannot
    be known from here: another boot, another PID namespace, or a process that this user may not see."""
    if not identity.boot_id or identity.pid <= 0:
        return None
    if (identity.boot_id, identity.pid_namespace) != (_boot_id(), _pid_namespace()):
        return None
    try:
        state, start_time_ticks = _stat(identity.pid)
        if start_time_ticks != identity.start_time_ticks:
            return True
        if state not in "ZX":
            return False
        # The first thread may have ended, and be shown as the process's state, while others still run and write.
        return not {entry.name for entry in Path(f"/proc/{identity.pid}/task").iterdir()} - {str(identity.pid)}
    except (FileNotFoundError, ProcessLookupError):
        return _is_gone(identity.pid)
    except PermissionError:
        return None


def _is_gone(pid: int) -> bool | None:
    """/proc may be mounted so that it hides other users' processes; a signal's permission check is not fooled."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return None
    return None


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _pid_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def _stat(pid: int) -> tuple[str, int]:
    """(state, start time in ticks).  The second field, the command's name, may hold spaces and brackets."""
    text = Path(f"/proc/{pid}/stat").read_bytes().decode("utf-8", errors="replace")
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[19])
