"""The backend over UCX: ucp.c by ctypes.  Regions, remote keys and endpoints as in ucx-py, without its event loop."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import os
import threading
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from transport.base import Counters, Op, Path, Region, RemoteRegion, Transfer
from transport.build import build
from transport.completions import Completion, Completions
from transport.descriptor import Descriptor
from transport.errors import (
    BackendUnavailable,
    OutOfMemory,
    PeerLost,
    TransferCancelled,
    TransportClosed,
    TransportError,
)
from transport.pieces import U64, Offsets, check_pieces

OLDEST_UCX = (1, 12)
CONNECT_TIMEOUT_MS = 2000

# Set before the library loads, unless the user did.  Sites with InfiniBand set UCX_TLS themselves.
_SETTINGS = {
    # posix: segments that a peer maps.  tcp: everything else, and the news of a peer's death.  Not cma, whose survivors
    # abort when a peer dies.
    "UCX_TLS": "posix,tcp,self",
    # Rendezvous serves no one-sided operation, but while it is on, endpoints that report failures get emulated puts over
    # tcp: 8 KiB a message, each answered, and an owner whose answer meets a dead writer's socket aborts inside UCX.
    "UCX_RNDV_THRESH": "inf",
    # A host that vanished without a word is noticed within seconds, not within 20.
    "UCX_KEEPALIVE_INTERVAL": "1s",
    # Crashes stay Python's to report: a library takes over no signals.
    "UCX_ERROR_SIGNALS": "",
    # A peer's death is an outcome here, told as PeerLost, not a line on the terminal.
    "UCX_LOG_LEVEL": "fatal",
    # Other UCX versions know other variables.
    "UCX_WARN_UNUSED_ENV_VARS": "n",
}
# With posix: a pool that does not fit into shared memory fails, instead of silently going at the speed of tcp.
_SHARED_MEMORY_ONLY = b"md:posix"

_OK = 0
_PACKED_KEY_BYTES = 4096
_PATHS = {1: Path.MAPPED, 2: Path.RMA}


class _CompletionStruct(ctypes.Structure):
    _fields_ = (
        *((name, c_uint64) for name in ("cookie", "nbytes", "num_pieces", "queued_ns", "busy_ns")),
        *((name, c_int32) for name in ("outcome", "status", "path")),
    )


@dataclass(slots=True)
class _Connection:
    handle: c_void_p
    num_remotes: int = 0


class UcpTransport:
    """See ``transport.base.Transport``.  One thread, in C, owns the UCP worker."""

    name = "ucx"

    def __init__(self) -> None:
        """Raises BackendUnavailable with what to do."""
        self._lib = _load()
        self.incarnation = int.from_bytes(os.urandom(8), "little")
        self._control = threading.RLock()  # one call into the library's control side at a time
        self._connections: dict[int, _Connection] = {}  # by the peer's incarnation
        self._owners: dict[RemoteRegion, tuple[c_void_p, _Connection]] = {}
        self._regions: dict[Region, c_void_p] = {}
        self._closed = False
        self._drained = (_CompletionStruct * 256)()
        self._completions = Completions(self._drain, self._cancel)
        self._ferry = c_void_p()
        alloc_prio = _SHARED_MEMORY_ONLY if _uses_shared_memory() and "UCX_ALLOC_PRIO" not in os.environ else None
        status = self._lib.kvf_open(self._completions.event_fd, alloc_prio, byref(self._ferry))
        if status != _OK:
            self._completions.close()
            raise BackendUnavailable(
                f"UCX could not start with UCX_TLS={os.environ['UCX_TLS']}: {self._text(status)}; "
                "unset UCX_TLS or name transports that `ucx_info -d` lists"
            )
        length = self._lib.kvf_address(self._ferry, None, 0)
        address = ctypes.create_string_buffer(length)
        self._lib.kvf_address(self._ferry, address, length)
        self._address = address.raw

    def allocate(self, nbytes: int) -> Region:
        if nbytes <= 0:
            raise ValueError(f"a region has at least one byte, not {nbytes}")
        handle, base, key_length = c_void_p(), c_uint64(), c_uint64(_PACKED_KEY_BYTES)
        key = ctypes.create_string_buffer(_PACKED_KEY_BYTES)
        with self._control:
            self._check_open()
            _check_shared_memory(nbytes)
            status = self._lib.kvf_allocate(self._ferry, nbytes, byref(handle), byref(base))
            if status != _OK:
                raise OutOfMemory(f"UCX could not allocate {nbytes} bytes: {self._text(status)}; {_ROOM_HINT}")
            status = self._lib.kvf_pack(self._ferry, handle, key, byref(key_length))
            if status != _OK:
                self._lib.kvf_release(self._ferry, handle)
                raise TransportError(f"UCX could not pack the region's key: {self._text(status)}")
            descriptor = Descriptor(
                self.name, self.incarnation, base.value, nbytes, self._address, key.raw[: key_length.value]
            )
            region = Region(base.value, nbytes, descriptor.pack(), self._release)
            self._regions[region] = handle
            return region

    def open(self, descriptor: bytes) -> RemoteRegion:
        d = Descriptor.unpack(descriptor, backend=self.name)
        with self._control:
            self._check_open()
            connection = self._connect(d)
            handle, mapped = c_void_p(), c_int()
            status = self._lib.kvf_import(
                self._ferry,
                connection.handle,
                d.key,
                d.base,
                d.nbytes,
                CONNECT_TIMEOUT_MS,
                byref(handle),
                byref(mapped),
            )
            if status != _OK:
                raise PeerLost(f"the region's owner cannot be reached: {self._text(status)}")
            connection.num_remotes += 1
            remote = RemoteRegion(
                d.incarnation, d.nbytes, Path.MAPPED if mapped.value else Path.RMA, self._close_remote
            )
            self._owners[remote] = (handle, connection)
            return remote

    def post(self, op: Op, local: Region, remote: RemoteRegion, local_offsets: Offsets, remote_offsets: Offsets,
             sizes: Offsets | int) -> Transfer:  # fmt: skip
        here, there, size = check_pieces(
            local_offsets, remote_offsets, sizes, local_nbytes=local.nbytes, remote_nbytes=remote.nbytes
        )

        def submit(cookie: int) -> None:
            region, (target, _) = self._regions[local], self._owners[remote]
            arrays = (_pointer(here), _pointer(there), _pointer(size))
            status = self._lib.kvf_post(self._ferry, op.value, region, target, len(here), *arrays, cookie)
            if status != _OK:
                raise TransportError(f"UCX did not take the batch: {self._text(status)}")

        return self._completions.start(op, local, remote, len(here), submit)

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        self._check_open()
        self._completions.attach(loop)

    def detach(self) -> None:
        self._completions.detach()

    def poll(self, timeout_s: float) -> int:
        return self._completions.poll(timeout_s)

    def counters(self) -> Counters:
        return self._completions.counters()

    def close(self) -> None:
        if not self._completions.stop():
            return
        with self._control:
            self._closed = True
            self._lib.kvf_stop(self._ferry)
            self._completions.close()
            for region in self._completions.give_up_all(self._regions):
                self._lib.kvf_release(self._ferry, self._regions.pop(region))
            self._lib.kvf_free(self._ferry)
            self._connections.clear()
            self._owners.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _connect(self, d: Descriptor) -> _Connection:
        """The connection to a peer.  It stays while the peer lives, used or not: closing one side's endpoint would tear
        down the peer's own way back, which over tcp is the same socket."""
        for incarnation, connection in list(self._connections.items()):
            if self._lib.kvf_peer_status(connection.handle) != _OK:
                del self._connections[incarnation]  # left to the remote regions that still name it
                self._disconnect_unused(connection)
        known = self._connections.get(d.incarnation)
        if known is not None:
            return known
        handle = c_void_p()
        status = self._lib.kvf_connect(self._ferry, d.address, byref(handle))
        if status != _OK:
            raise PeerLost(f"the region's owner cannot be reached: {self._text(status)}")
        self._connections[d.incarnation] = connection = _Connection(handle)
        return connection

    def _disconnect_unused(self, connection: _Connection) -> None:
        if connection.num_remotes == 0:
            self._lib.kvf_disconnect(self._ferry, connection.handle)

    def _close_remote(self, remote: RemoteRegion) -> None:
        with self._control:
            if self._completions.give_up(remote) and not self._closed:
                handle, connection = self._owners.pop(remote)
                self._lib.kvf_drop(self._ferry, handle)
                connection.num_remotes -= 1
                if self._connections.get(remote.incarnation) is not connection:
                    self._disconnect_unused(connection)

    def _release(self, region: Region) -> None:
        with self._control:
            if self._closed:
                return
            if self._completions.give_up(region):
                self._lib.kvf_release(self._ferry, self._regions.pop(region))

    def _drain(self) -> list[Completion]:
        if not self._ferry:
            return []  # it never started
        n = self._lib.kvf_drain(self._ferry, self._drained, len(self._drained))
        return [
            Completion(
                c.cookie, c.nbytes, c.num_pieces, c.queued_ns / 1e9, c.busy_ns / 1e9, _PATHS[c.path], self._error(c)
            )
            for c in self._drained[:n]
        ]

    def _cancel(self, cookie: int) -> None:
        self._lib.kvf_cancel(self._ferry, cookie)

    def _error(self, c: _CompletionStruct) -> TransportError | None:
        match c.outcome:
            case 0:
                return None
            case 1:
                return TransferCancelled(f"cancelled after {c.nbytes} bytes")
            case 2:
                return PeerLost(f"the region's owner was lost: {self._text(c.status)}")
            case 4:
                return TransportClosed("the transport was closed and the owner did not answer in time")
            case _:
                return TransportError(f"UCX: {self._text(c.status)}")

    def _text(self, status: int) -> str:
        text: bytes = self._lib.kvf_status_string(status)
        return text.decode()

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed("the transport was closed")


_ROOM_HINT = (
    "make the region smaller or shared memory larger (docker run --shm-size=..., or mount -o remount,size=... /dev/shm)"
)


def _check_shared_memory(nbytes: int) -> None:
    """UCX fills a segment with zeros to see whether it fits; this spares a full /dev/shm to everybody else."""
    if not _uses_shared_memory():
        return
    where = os.environ.get("UCX_POSIX_DIR", "/dev/shm")
    try:
        stat = os.statvfs(where)
    except OSError as e:
        raise OutOfMemory(f"{where} cannot be used for shared memory: {e.strerror}; mount a tmpfs there") from e
    free = stat.f_bavail * stat.f_frsize
    if nbytes > free:
        raise OutOfMemory(f"a region of {nbytes} bytes does not fit: {where} has {free} bytes left; {_ROOM_HINT}")
    available = _available_memory()
    if nbytes > available:  # a tmpfs may be larger than the memory behind it
        raise OutOfMemory(
            f"a region of {nbytes} bytes does not fit: {available} bytes are free; make the region smaller"
        )


def _available_memory() -> int:
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _uses_shared_memory() -> bool:
    names = os.environ["UCX_TLS"].split(",")
    return names[0].startswith("^") or not {"posix", "shm", "sm", "all"}.isdisjoint(names)


def _pointer(array: U64) -> c_void_p:
    return c_void_p(array.ctypes.data)


@functools.cache
def _load() -> ctypes.CDLL:
    """Compiles the binding if need be and loads it, with the UCX it is linked with, once per process."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        path = build()
        lib = ctypes.CDLL(str(path))
    except (FileNotFoundError, RuntimeError) as e:
        raise BackendUnavailable(str(e)) from e
    except OSError as e:
        raise BackendUnavailable(f"the UCX binding does not load ({e}); run `make clean setup`") from e
    size, h, p = c_uint64, c_void_p, POINTER(c_void_p)
    for name, result, arguments in (
        ("open", c_int, [c_int, c_char_p, p]),
        ("stop", None, [h]),
        ("free", None, [h]),
        ("address", size, [h, c_void_p, size]),
        ("allocate", c_int, [h, size, p, POINTER(size)]),
        ("release", c_int, [h, h]),
        ("pack", c_int, [h, h, c_void_p, POINTER(size)]),
        ("connect", c_int, [h, c_char_p, p]),
        ("peer_status", c_int, [h]),
        ("disconnect", c_int, [h, h]),
        ("import", c_int, [h, h, c_char_p, size, size, size, p, POINTER(c_int)]),
        ("drop", c_int, [h, h]),
        ("post", c_int, [h, c_int, h, h, size, c_void_p, c_void_p, c_void_p, size]),
        ("cancel", c_int, [h, size]),
        ("drain", size, [h, c_void_p, size]),
        ("completion_size", size, []),
        ("status_string", c_char_p, [c_int]),
        ("version", None, [POINTER(c_uint)] * 3),
    ):
        function = getattr(lib, f"kvf_{name}")
        function.restype, function.argtypes = result, arguments
    assert lib.kvf_completion_size() == ctypes.sizeof(_CompletionStruct), "ucp.c and ucp.py disagree"
    major, minor, release = c_uint(), c_uint(), c_uint()
    lib.kvf_version(byref(major), byref(minor), byref(release))
    if (major.value, minor.value) < OLDEST_UCX:
        raise BackendUnavailable(
            f"UCX {major.value}.{minor.value}.{release.value} is too old, kvferry needs {OLDEST_UCX[0]}.{OLDEST_UCX[1]} "
            "or newer: pip install -U libucx-cu13, or point KVFERRY_UCX_HOME at a newer UCX"
        )
    return lib
