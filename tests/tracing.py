"""Stops or ends one thread of another process, by ptrace(2): what no signal does, and a bug in a library may.

For processes that this one started, on x86-64.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SEIZE, _INTERRUPT, _SYSCALL, _CONT, _GETREGS, _SETREGS, _DETACH = 0x4206, 0x4207, 24, 7, 12, 13, 17
_WALL = 0x40000000
_RESTART_SYSCALL, _POLL, _EXIT = 219, 7, 60
_NUM_TRIES = 200


# Of sys/user.h's user_regs_struct.
_NUM_REGISTERS, _RAX, _RDI, _ORIG_RAX = 27, 10, 14, 15
_ENOSYS = 38


class CannotTraceError(Exception):
    """Says why."""


def thread_of(pid: int, name: str) -> int:
    """The one of that name.  Raises LookupError."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        if (task / "comm").read_text().strip() == name:
            return int(task.name)
    raise LookupError(f"process {pid} has no thread {name}")


class Held:
    """A thread that stands still, wherever it is, while the others of its process go on.  For one thread's use."""

    def __init__(self, tid: int) -> None:
        self._tid = tid
        self.has_ended = False

    def end(self) -> None:
        """It goes on to where it would wait in poll(2), which is where it holds no lock, and ends there."""
        registers = (ctypes.c_longlong * _NUM_REGISTERS)()
        for _ in range(_NUM_TRIES):
            _ptrace(_SYSCALL, self._tid)  # to the next system call's begin or end
            os.waitpid(self._tid, _WALL)
            _ptrace(_GETREGS, self._tid, ctypes.addressof(registers))
            begins = registers[_RAX] == -_ENOSYS  # until the kernel has done it
            if begins and registers[_ORIG_RAX] in (_POLL, _RESTART_SYSCALL):
                registers[_ORIG_RAX], registers[_RDI] = _EXIT, 0
                _ptrace(_SETREGS, self._tid, ctypes.addressof(registers))
                _ptrace(_CONT, self._tid)
                os.waitpid(self._tid, _WALL)
                self.has_ended = True
                return
        raise TimeoutError(f"thread {self._tid} does not wait in poll")


@contextmanager
def held(tid: int) -> Iterator[Held]:
    """In the end the thread goes on, unless it has ended.  Raises CannotTraceError."""
    _seize(tid)
    thread = Held(tid)
    try:
        yield thread
    finally:
        if not thread.has_ended and Path(f"/proc/{tid}").exists():
            _ptrace(_DETACH, tid)


def _seize(tid: int) -> None:
    if platform.machine() != "x86_64":
        raise CannotTraceError(f"written for x86-64, this is {platform.machine()}")
    try:
        _ptrace(_SEIZE, tid)
    except PermissionError as e:
        raise CannotTraceError(f"this process may not trace others: {e}") from e
    _ptrace(_INTERRUPT, tid)
    os.waitpid(tid, _WALL)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


def _ptrace(request: int, tid: int, data: int = 0) -> None:
    if _libc.ptrace(request, tid, None, data) == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
