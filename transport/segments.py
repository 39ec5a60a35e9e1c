"""Memory that other processes of this host can map: one nameless file (memfd_create(2)) a segment.

A peer opens it through the owner's entry in /proc, so nothing is left behind when a process dies and no mounted /dev/shm
has to be large enough.  Behind the owner's bytes lies a mark with its incarnation: whoever maps a segment by a process's
number knows by it that this is the segment it was told of, and sees from it that the owner has given the segment up.
Linux makes pages of 4 KiB here unless asked; of 2 MiB, copies between scattered blocks miss the TLB no more.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import hashlib
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from transport.errors import OutOfMemory, PeerLost

PAGE = os.sysconf("SC_PAGE_SIZE")
HUGE_PAGE = 2 << 20
MARK_NBYTES = 24
POPULATE_THREADS = 4
CONTROL_GROUP = Path("/sys/fs/cgroup")

_MARK = struct.Struct("<QQQ")  # incarnation (0: given up), the owner's bytes, whether the pages are huge
_PROT_NONE, _PROT_READ_WRITE = 0, 3
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 0x1, 0x2, 0x10, 0x20, 0x4000
_MADV_POPULATE_WRITE, _MADV_COLLAPSE = 23, 25  # Linux 5.14 and 6.1
# Its size is fixed for good: a store behind the end of a file that shrank would end the process that made it.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class CannotMap(Exception):
    """The segment cannot be mapped from here, its owner may well live; the message says why."""


@dataclass(frozen=True, slots=True)
class SegmentName:
    """Where a segment is found: ``host`` tells boots and PID namespaces apart, ``fd`` is the owner's."""

    host: bytes
    pid: int
    fd: int

    @property
    def path(self) -> str:
        return f"/proc/{self.pid}/fd/{self.fd}"


class Segment:
    """Mapped here: made by its owner, or opened by a peer, which also gets ``process``, a pidfd of the owner."""

    def __init__(self, address: int, nbytes: int, mapped_nbytes: int, fd: int | None, process: int | None) -> None:
        self.address = address
        self.nbytes = nbytes
        self.mapped_nbytes = mapped_nbytes
        self.process = process
        self._fd = fd

    @property
    def name(self) -> SegmentName:
        assert self._fd is not None, "only its owner can name a segment"
        return SegmentName(this_host(), os.getpid(), self._fd)

    @property
    def mark_address(self) -> int:
        """Eight bytes that hold the owner's incarnation, until it gives the segment up."""
        return self.address + mark_offset(self.nbytes)

    @property
    def huge(self) -> bool:
        return bool(_MARK.unpack(ctypes.string_at(self.mark_address, MARK_NBYTES))[2])

    def give_up(self) -> None:
        """By the owner: peers that have it mapped stop at their next piece.  Idempotent."""
        ctypes.memset(self.mark_address, 0, 8)
        self._close_fd()

    def unmap(self) -> None:
        """Nobody may look at the memory any more.  The pages go once every peer has unmapped them too."""
        self._close_fd()
        if self.process is not None:
            os.close(self.process)
            self.process = None
        if self.mapped_nbytes:
            _libc().munmap(self.address, self.mapped_nbytes)
            self.mapped_nbytes = 0

    def _close_fd(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def make_segment(nbytes: int, incarnation: int) -> Segment:
    """Zeroed, with all its pages, of 2 MiB where the kernel gives them.  Blocks: about 0.2 s for 4 GiB on an idle
    machine.  Raises OutOfMemory."""
    available = available_memory()
    if nbytes > available:
        raise OutOfMemory(
            f"a region of {nbytes} bytes does not fit: {available} bytes are free; make the region smaller"
        )
    file_nbytes = _file_nbytes(nbytes)
    try:
        fd = os.memfd_create("kvferry", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as e:
        raise OutOfMemory(f"no shared memory can be had: {e.strerror}") from e
    try:
        os.ftruncate(fd, file_nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        address = _map(fd, file_nbytes)
    except OSError as e:
        os.close(fd)
        raise OutOfMemory(f"a region of {nbytes} bytes cannot be mapped: {e.strerror}; make the region smaller") from e
    segment = Segment(address, nbytes, file_nbytes, fd, None)
    try:
        huge = _populate(address, file_nbytes)
    except OSError as e:
        segment.unmap()
        raise OutOfMemory(f"a region of {nbytes} bytes cannot be had: {e.strerror}; make the region smaller") from e
    ctypes.memmove(segment.mark_address, _MARK.pack(incarnation, nbytes, huge), MARK_NBYTES)
    return segment


def open_segment(name: SegmentName, nbytes: int, incarnation: int) -> Segment:
    """A peer's segment, mapped here.  Raises CannotMap, or PeerLost with proof that its owner has ended or given it up."""
    if name.host != this_host():
        raise CannotMap("the owner is on another host or in another PID namespace")
    try:
        process = os.pidfd_open(name.pid)  # before its memory: a number that is used again is seen by the mark
    except ProcessLookupError as e:
        raise PeerLost(f"the region's owner, process {name.pid}, has ended") from e
    except OSError as e:
        raise CannotMap(f"process {name.pid} cannot be watched: {e.strerror}") from e
    try:
        return _open_segment(name, nbytes, incarnation, process)
    except BaseException:
        os.close(process)
        raise


def _open_segment(name: SegmentName, nbytes: int, incarnation: int, process: int) -> Segment:
    lost = PeerLost(f"the region's owner, process {name.pid}, has ended or given the region up")
    try:
        fd = os.open(name.path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as e:
        raise lost from e
    except OSError as e:
        raise CannotMap(
            f"{name.path} cannot be opened: {e.strerror}; both processes must belong to the same user"
        ) from e
    try:
        if os.fstat(fd).st_size != _file_nbytes(nbytes) or not _is_sealed(fd):
            raise lost  # the number belongs to something else by now
        mark = os.pread(fd, MARK_NBYTES, mark_offset(nbytes))
        if len(mark) != MARK_NBYTES or _MARK.unpack(mark)[:2] != (incarnation, nbytes):
            raise lost
        address = _map(fd, _file_nbytes(nbytes))
    except OSError as e:
        raise CannotMap(f"{name.path} cannot be mapped: {e.strerror}") from e
    finally:
        os.close(fd)
    segment = Segment(address, nbytes, _file_nbytes(nbytes), None, process)
    if segment.huge:  # entered into our page tables at once, a few ms for GiBs; small pages come with the first write
        _madvise(address, segment.mapped_nbytes, _MADV_POPULATE_WRITE)
    return segment


def mark_offset(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def available_memory() -> int:
    """Bytes that this process could still get: the machine's, or what its control group leaves."""
    with open("/proc/meminfo") as lines:
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    with suppress(OSError, ValueError):  # no group, or one without a limit
        limit, used = (int((CONTROL_GROUP / f"memory.{what}").read_text()) for what in ("max", "current"))
        free = min(free, limit - used)
    return max(0, free)


@functools.cache
def this_host() -> bytes:
    """Equal in two processes if each can find the other by its number."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    return hashlib.blake2b(boot + str(os.stat("/proc/self/ns/pid").st_ino).encode(), digest_size=16).digest()


def _is_sealed(fd: int) -> bool:
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        return False


def _file_nbytes(nbytes: int) -> int:
    return mark_offset(nbytes) + PAGE


def _map(fd: int, nbytes: int) -> int:
    """At a multiple of 2 MiB, without which no page of that size can be entered."""
    libc = _libc()
    room = libc.mmap(None, nbytes + HUGE_PAGE, _PROT_NONE, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
    if room == ctypes.c_void_p(-1).value:
        raise _os_error()
    address: int = -(-room // HUGE_PAGE) * HUGE_PAGE
    end = room + nbytes + HUGE_PAGE
    if libc.mmap(address, nbytes, _PROT_READ_WRITE, _MAP_SHARED | _MAP_FIXED, fd, 0) != address:
        error = _os_error()
        libc.munmap(room, nbytes + HUGE_PAGE)
        raise error
    behind = -(-(address + nbytes) // PAGE) * PAGE
    for start, stop in ((room, address), (behind, end)):
        if stop > start:
            libc.munmap(start, stop - start)
    return address


def _populate(address: int, nbytes: int) -> bool:
    """Makes every page; True when all whole 2 MiB became one.  Raises OSError when there is not enough memory."""
    num_huge = nbytes // HUGE_PAGE
    num_threads = max(1, min(POPULATE_THREADS, os.cpu_count() or 1, num_huge))
    bounds = [address + num_huge * i // num_threads * HUGE_PAGE for i in range(num_threads + 1)]
    with ThreadPoolExecutor(num_threads) as threads:
        collapsed = list(threads.map(_collapse, bounds[:-1], bounds[1:]))
        bounds[-1] = address + nbytes
        errors = list(threads.map(_populate_part, bounds[:-1], bounds[1:]))
    if failed := max(errors):
        raise OSError(failed, os.strerror(errno.ENOMEM if failed == errno.EFAULT else failed))
    return all(collapsed)


def _collapse(start: int, stop: int) -> bool:
    """One small page in each 2 MiB, then all of them at once: only what has a page can be made larger."""
    if start == stop:
        return False
    for page in range(start, stop, HUGE_PAGE):
        if _madvise(page, PAGE, _MADV_POPULATE_WRITE):
            return False
    return _madvise(start, stop - start, _MADV_COLLAPSE) == 0


def _populate_part(start: int, stop: int) -> int:
    """0, or the error's number.  Unlike a store, this fails with an error where no page can be had, not with a signal."""
    failed = _madvise(start, stop - start, _MADV_POPULATE_WRITE)
    if failed == errno.EINVAL:  # an older kernel
        ctypes.memset(start, 0, stop - start)
        return 0
    return failed


def _madvise(address: int, nbytes: int, advice: int) -> int:
    return ctypes.get_errno() if _libc().madvise(address, nbytes, advice) else 0


def _os_error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    libc.mmap.restype = pointer
    libc.mmap.argtypes = [pointer, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.munmap.argtypes = [pointer, size]
    libc.madvise.argtypes = [pointer, size, ctypes.c_int]
    return libc
