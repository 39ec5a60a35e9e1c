"""The backend over UCX: ferry.c and ucp.c by ctypes.  Regions, remote keys and endpoints as in ucx-py, without its loop."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import os
import struct
import threading
from collections.abc import Callable
from ctypes import POINTER, byref, c_char_p, c_int, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from transport.base import Counters, Op, Path, Region, RemoteRegion, Transfer, TransferResult
from transport.build import build
from transport.completions import Completion, Completions
from transport.cuda import DeviceSegment
from transport.descriptor import Descriptor
from transport.errors import (
    BackendUnavailable,
    OutOfMemory,
    PeerLost,
    TransferCancelled,
    TransportClosed,
    TransportError,
)
from transport.lending import lender
from transport.pieces import Offsets, Pieces
from transport.segments import CannotMap, Segment, make_segment, mark_offset, open_segment
from transport.sockets import bound_delivery

OLDEST_UCX = (1, 12)
# Older ones look for a GPU's memory in another process by the calling thread's CUDA context, of which ferry.c's thread has
# none, and take TCP instead without a word (https://github.com/openucx/ucx/pull/11194, 11240 for 1.20).
OLDEST_UCX_FOR_GPUS = (1, 20, 1)
CONNECT_TIMEOUT_MS = 2000

STALL_TIMEOUT_MS = 10_000
# Less, so that of a host out of reach the kernel tells first: then nothing of what was sent arrives later.  An endpoint
# that UCX closes by force keeps its socket, and UCX 1.22 crashes when that can be written to again.
DELIVERY_TIMEOUT_MS = 7_000

# Set before the library loads, unless the user did.
SETTINGS = {
    # Whatever this UCX has (tcp, and RDMA or CUDA where they are), save what reaches another process's memory by its
    # number: survivors of cma abort when a peer dies, and on one host kvferry maps the memory itself.
    "UCX_TLS": "^sysv,cma,xpmem,knem",
    # Rendezvous serves no one-sided operation, but while it is on, endpoints that report failures get emulated puts over
    # tcp: 8 KiB a message, each answered, and an owner whose answer meets a dead writer's socket aborts inside UCX.
    "UCX_RNDV_THRESH": "inf",
    # Of 8 KiB otherwise, which every piece of an emulated read (see ADR 1) is cut into: a third of the speed.
    "UCX_TCP_TX_SEG_SIZE": "64k",
    "UCX_TCP_RX_SEG_SIZE": "64k",
    # Otherwise the one thread that serves all peers waits minutes in connect() for a host that is out of reach.
    "UCX_TCP_CONN_NB": "y",
    # A host that vanished without a word is noticed within seconds, not within 20.
    "UCX_KEEPALIVE_INTERVAL": "1s",
    # Reads between GPUs' pools go by CUDA IPC on hosts without NVLink too, where UCX would leave them to TCP.
    "UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "on",
    # Crashes stay Python's to report: a library takes over no signals.
    "UCX_ERROR_SIGNALS": "",
    # A peer's death is an outcome here, told as PeerLost, not a line on the terminal.
    "UCX_LOG_LEVEL": "fatal",
    # Other UCX versions know other variables.
    "UCX_WARN_UNUSED_ENV_VARS": "n",
}

_OK, _INVALID_PARAM = 0, -5
_PACKED_KEY_BYTES = 4096
_PATHS = {1: Path.MAPPED, 2: Path.RMA}


_ENDED = struct.Struct("6Q3i4x")  # ferry.h's completion_t
_DRAIN_AT_ONCE = 256


@dataclass(slots=True)
class _Connection:
    handle: c_void_p
    num_remotes: int = 0


@dataclass(frozen=True, slots=True)
class _Opened:
    """What stands behind a RemoteRegion: a mapping, or a connection."""

    handle: c_void_p
    segment: Segment | None = None
    connection: _Connection | None = None


class UcpTransport:
    """See ``transport.base.Transport``.  One thread, in C, owns the UCP worker."""

    name = "ucx"

    def __init__(self) -> None:
        """Raises BackendUnavailable with what to do."""
        self._lib = _load()
        self.incarnation = int.from_bytes(os.urandom(8), "little")
        self._control = threading.Condition(threading.RLock())  # one call into the library's control side at a time
        self._num_waiting = 0  # threads that wait in the library, without the lock
        self._connections: dict[int, _Connection] = {}  # by the peer's incarnation
        self._opened: dict[RemoteRegion, _Opened] = {}
        self._regions: dict[Region, tuple[c_void_p, Segment | DeviceSegment]] = {}
        self._closed = False
        self._drained = ctypes.create_string_buffer(_DRAIN_AT_ONCE * _ENDED.size)
        self._done = ctypes.create_string_buffer(_ENDED.size)  # when it is posted; guarded by the completions' lock
        self._completions = Completions(self._drain, self._cancel)
        self._ferry = c_void_p()
        status = self._lib.kvf_open(self._completions.event_fd, STALL_TIMEOUT_MS, byref(self._ferry))
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

    def allocate(self, nbytes: int, device: int | None = None) -> Region:
        if nbytes <= 0:
            raise ValueError(f"a region has at least one byte, not {nbytes}")
        self._check_open()
        segment: Segment | DeviceSegment
        if device is None:
            segment = make_segment(nbytes, self.incarnation)
        else:
            if not carries_gpus(version := _version(self._lib)):
                raise BackendUnavailable(
                    f"UCX {_dotted(version)} would move the KV of GPUs over TCP; a pool on a GPU needs UCX "
                    f"{_dotted(OLDEST_UCX_FOR_GPUS)} or newer: pip install -U libucx-cu13, or point KVFERRY_UCX_HOME at "
                    "one, or use --device cpu"
                )
            segment = DeviceSegment(nbytes, self.incarnation, device)
        try:
            return self._register(segment)
        except BaseException:
            segment.unmap()
            raise

    def _register(self, segment: Segment | DeviceSegment) -> Region:
        handle, key_length = c_void_p(), c_uint64(_PACKED_KEY_BYTES)
        key = ctypes.create_string_buffer(_PACKED_KEY_BYTES)
        with self._control:
            self._check_open()
            status = self._lib.kvf_register(
                self._ferry, segment.address, segment.nbytes, segment.mapped_nbytes, byref(handle)
            )
            if status != _OK:
                raise OutOfMemory(
                    f"UCX could not register {segment.nbytes} bytes: {self._text(status)}; raise the limit of locked "
                    "memory (ulimit -l unlimited, docker run --ulimit memlock=-1) or make the region smaller"
                )
            status = self._lib.kvf_pack(self._ferry, handle, key, byref(key_length))
            if status != _OK:
                self._lib.kvf_release(self._ferry, handle)
                raise TransportError(f"UCX could not pack the region's key: {self._text(status)}")
            descriptor = Descriptor(
                self.name,
                self.incarnation,
                segment.address,
                segment.nbytes,
                segment.name if may_map(os.environ["UCX_TLS"]) else None,
                self._address,
                key.raw[: key_length.value],
            )
            region = Region(
                segment.address, segment.nbytes, descriptor.pack(), self._release,
                huge_pages=segment.huge, device=segment if isinstance(segment, DeviceSegment) else None,
                lend=lender(segment, self.incarnation),
            )  # fmt: skip
            self._regions[region] = (handle, segment)
            return region

    def open(self, descriptor: bytes) -> RemoteRegion:
        d = Descriptor.unpack(descriptor, backend=self.name)
        self._check_open()
        try:
            return self._map(d)
        except CannotMap as e:
            return self._connect_to(d, str(e))

    def _map(self, d: Descriptor) -> RemoteRegion:
        if d.segment is None:
            raise CannotMap("the owner's UCX_TLS allows no shared memory, or its pool is a GPU's")
        if not may_map(os.environ["UCX_TLS"]):
            raise CannotMap("this process's UCX_TLS allows no shared memory")
        if any(region.device is not None for region in list(self._regions)):
            raise CannotMap("this process's pool is a GPU's, which plain stores cannot read")
        segment = open_segment(d.segment, d.nbytes, d.incarnation)
        handle = c_void_p()
        status = self._lib.kvf_map(
            segment.address, d.nbytes, segment.mark_address, d.incarnation, segment.process, byref(handle)
        )
        if status != _OK:
            segment.unmap()
            raise TransportError(f"UCX: {self._text(status)}")
        remote = RemoteRegion(d.incarnation, d.nbytes, Path.MAPPED, self._close_remote)
        with self._control:
            if self._closed:
                self._lib.kvf_drop(self._ferry, handle)
                segment.unmap()
                self._check_open()
            self._opened[remote] = _Opened(handle, segment=segment)
        return remote

    def _connect_to(self, d: Descriptor, why_not_mapped: str) -> RemoteRegion:
        handle = c_void_p()
        with self._control:
            self._check_open()
            connection = self._connect(d)
            status = self._lib.kvf_import(
                self._ferry, connection.handle, d.key, d.base, d.nbytes, mark_offset(d.nbytes), byref(handle)
            )
            self._check_reached(status)
            connection.num_remotes += 1
            self._num_waiting += 1
        status = self._lib.kvf_wait_peer(self._ferry, connection.handle, CONNECT_TIMEOUT_MS)
        with self._control:
            self._num_waiting -= 1
            self._control.notify_all()
            if status != _OK or self._closed:
                connection.num_remotes -= 1
                self._lib.kvf_abandon(self._ferry, handle)
                self._check_open()
            self._check_reached(status)
            bound_delivery(DELIVERY_TIMEOUT_MS)
            remote = RemoteRegion(d.incarnation, d.nbytes, Path.RMA, self._close_remote, why_not_mapped)
            self._opened[remote] = _Opened(handle, connection=connection)
            return remote

    def _check_reached(self, status: int) -> None:
        if status != _OK:
            raise PeerLost(f"the region's owner cannot be reached: {self._text(status)}")

    def post(self, op: Op, local: Region, remote: RemoteRegion, local_offsets: Offsets, remote_offsets: Offsets,
             sizes: Offsets | int) -> Transfer:  # fmt: skip
        if local.device is not None and remote.path is Path.MAPPED:
            raise ValueError("the remote region was opened before there was one on a GPU; open it again")
        pieces = Pieces.of(local_offsets, remote_offsets, sizes)
        return self._completions.start(op, local, remote, pieces, self._submit)

    def _submit(
        self, op: Op, local: Region, remote: RemoteRegion, pieces: Pieces, cookie: int
    ) -> TransferResult | TransportError | None:
        status = self._lib.kvf_post(
            self._ferry,
            op is Op.READ,
            self._regions[local][0],
            self._opened[remote].handle,
            *pieces,
            cookie,
            self._done,
        )
        if status == _OK:
            done = _ENDED.unpack(self._done)
            return self._outcome(done) if done[0] else None
        if status == _INVALID_PARAM:
            error = pieces.out_of_bounds(local.nbytes, remote.nbytes)
            assert error is not None, "ferry.c and pieces.py disagree"
            raise error
        raise TransportError(f"UCX did not take the batch: {self._text(status)}")

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        self._check_open()
        self._completions.attach(loop)

    def detach(self) -> None:
        self._completions.detach()

    def poll(self, timeout_s: float) -> int:
        return self._completions.poll(timeout_s)

    def fence(self, timeout_s: float) -> bool:
        with self._control:
            self._check_open()
            self._num_waiting += 1
        status = self._lib.kvf_fence(self._ferry, int(timeout_s * 1000))
        with self._control:
            self._num_waiting -= 1
            self._control.notify_all()
        return bool(status == _OK)

    def pulse(self) -> int:
        self._check_open()
        turns: int = self._lib.kvf_turns(self._ferry)
        if not turns:
            raise TransportError("the transport's thread has ended")
        return turns

    def counters(self) -> Counters:
        return self._completions.counters()

    def close(self) -> None:
        if not self._completions.stop():
            return
        with self._control:
            self._closed = True
            while self._num_waiting:
                self._control.wait()
            self._lib.kvf_stop(self._ferry)
            self._completions.close()
            for opened in self._opened.values():
                if opened.segment is not None:
                    self._lib.kvf_drop(self._ferry, opened.handle)
                    opened.segment.unmap()
            for _, segment in self._regions.values():
                segment.give_up()
            for region in self._completions.give_up_all(self._regions):
                handle, segment = self._regions.pop(region)
                self._lib.kvf_release(self._ferry, handle)
                segment.unmap()
            self._lib.kvf_free(self._ferry)
            self._connections.clear()
            self._opened.clear()

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
        self._check_reached(self._lib.kvf_connect(self._ferry, d.address, d.incarnation, byref(handle)))
        self._connections[d.incarnation] = connection = _Connection(handle)
        return connection

    def _disconnect_unused(self, connection: _Connection) -> None:
        if connection.num_remotes == 0:
            self._lib.kvf_disconnect(self._ferry, connection.handle)

    def _close_remote(self, remote: RemoteRegion) -> None:
        with self._control:
            if not self._completions.give_up(remote) or self._closed:
                return
            opened = self._opened.pop(remote)
            self._lib.kvf_drop(self._ferry, opened.handle)
            if opened.segment is not None:
                opened.segment.unmap()
            if opened.connection is not None:
                opened.connection.num_remotes -= 1
                if self._connections.get(remote.incarnation) is not opened.connection:
                    self._disconnect_unused(opened.connection)

    def _release(self, region: Region) -> None:
        with self._control:
            if self._closed or not self._completions.give_up(region):
                return
            handle, segment = self._regions.pop(region)
            segment.give_up()
            self._lib.kvf_release(self._ferry, handle)
            segment.unmap()

    def _drain(self) -> list[Completion]:
        if not self._ferry:
            return []  # it never started
        n = self._lib.kvf_drain(self._ferry, self._drained, _DRAIN_AT_ONCE)
        ended = _ENDED.iter_unpack(memoryview(self._drained)[: n * _ENDED.size])
        return [Completion(values[0], self._outcome(values)) for values in ended]

    def _cancel(self, cookie: int) -> None:
        self._lib.kvf_cancel(self._ferry, cookie)

    def _outcome(self, ended: tuple[int, ...]) -> TransferResult | TransportError:
        """Of the fields of ferry.h's completion_t."""
        _, nbytes, num_blocks, num_pieces, queued_ns, busy_ns, outcome, status, path = ended
        match outcome:
            case 0:
                return TransferResult(nbytes, num_blocks, num_pieces, queued_ns / 1e9, busy_ns / 1e9, _PATHS[path])
            case 1:
                return TransferCancelled(f"cancelled after {nbytes} bytes")
            case 2:
                return PeerLost(f"the region's owner was lost: {self._text(status)}")
            case 4:
                return TransportClosed("the transport was closed and the owner did not answer in time")
            case _:
                return TransportError(f"UCX: {self._text(status)}")

    def _text(self, status: int) -> str:
        text: bytes = self._lib.kvf_status_string(status)
        return text.decode()

    def _check_open(self) -> None:
        if self._closed:
            raise TransportClosed("the transport was closed")


def may_map(ucx_tls: str) -> bool:
    """UCX_TLS names what may carry bytes; mapped segments count as shared memory."""
    names = ucx_tls.lstrip("^").split(",")
    return ucx_tls.startswith("^") != bool({"posix", "shm", "sm", "all"}.intersection(names))


def carries_gpus(version: tuple[int, ...]) -> bool:
    """Whether a UCX of that version moves blocks between GPUs' pools of two processes as it should.  Pure."""
    return version >= OLDEST_UCX_FOR_GPUS


def ucx_version() -> str:
    """Of the UCX in use, such as 1.22.0.  Raises BackendUnavailable with what to do."""
    return _dotted(_version(_load()))


class Memory(Protocol):
    """Of this process."""

    @property
    def address(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


def memcpy(to: Memory, source: Memory, to_offsets: Offsets, source_offsets: Offsets, size: int) -> None:
    """Plain copies within this process, of ``size`` bytes each: what transfers are measured against.  Blocks.  Raises
    as Transport.post does."""
    _copy(_load().kvf_memcpy, to, source, Pieces.of(to_offsets, source_offsets, size), size)


def stream(to: Memory, source: Memory, to_offsets: Offsets, source_offsets: Offsets, size: int) -> None:
    """As ``memcpy``, but past the cache, which it leaves to whoever computes beside."""
    _copy(_load().kvf_stream, to, source, Pieces.of(to_offsets, source_offsets, size), size)


def _copy(function: Callable[..., None], to: Memory, source: Memory, pieces: Pieces, size: int) -> None:
    if error := pieces.out_of_bounds(to.nbytes, source.nbytes):
        raise error
    function(to.address, source.address, pieces.packed, pieces.num_blocks, size)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _version(lib: ctypes.CDLL) -> tuple[int, int, int]:
    major, minor, release = c_uint(), c_uint(), c_uint()
    lib.kvf_version(byref(major), byref(minor), byref(release))
    return major.value, minor.value, release.value


@functools.cache
def _load() -> ctypes.CDLL:
    """Compiles the binding if need be and loads it, with the UCX it is linked with, once per process."""
    for name, value in SETTINGS.items():
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
        ("open", c_int, [c_int, size, p]),
        ("stop", None, [h]),
        ("free", None, [h]),
        ("address", size, [h, c_void_p, size]),
        ("register", c_int, [h, h, size, size, p]),
        ("release", c_int, [h, h]),
        ("pack", c_int, [h, h, c_void_p, POINTER(size)]),
        ("connect", c_int, [h, c_char_p, size, p]),
        ("peer_status", c_int, [h]),
        ("disconnect", c_int, [h, h]),
        ("import", c_int, [h, h, c_char_p, size, size, size, p]),
        ("wait_peer", c_int, [h, h, size]),
        ("abandon", c_int, [h, h]),
        ("map", c_int, [h, size, h, size, c_int, p]),
        ("fence", c_int, [h, size]),
        ("turns", size, [h]),
        ("drop", c_int, [h, h]),
        ("post", c_int, [h, c_int, h, h, c_char_p, size, size, size, h]),
        ("cancel", c_int, [h, size]),
        ("drain", size, [h, c_void_p, size]),
        ("memcpy", None, [h, h, c_char_p, size, size]),
        ("stream", None, [h, h, c_char_p, size, size]),
        ("completion_size", size, []),
        ("status_string", c_char_p, [c_int]),
        ("version", None, [POINTER(c_uint)] * 3),
    ):
        function = getattr(lib, f"kvf_{name}")
        function.restype, function.argtypes = result, arguments
    assert lib.kvf_completion_size() == _ENDED.size, "ferry.h and ucp.py disagree"
    version = _version(lib)
    if version < OLDEST_UCX:
        raise BackendUnavailable(
            f"UCX {_dotted(version)} is too old, kvferry needs {_dotted(OLDEST_UCX)} "
            "or newer: pip install -U libucx-cu13, or point KVFERRY_UCX_HOME at a newer UCX"
        )
    return lib
