"""Memory of a GPU that UCX can give to other processes: plain cuMemAlloc, by the driver's own library.

What torch's allocator hands out may be virtual memory, which UCX falls back to TCP for without a word.  The driver is there
wherever a GPU is, whichever CUDA the process computes with; both are in the device's primary context.  Never run on a
device: tests run it with a stand-in for the driver.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p

from transport.errors import BackendUnavailable, OutOfMemory, TransportError
from transport.segments import MARK_NBYTES, mark_offset

LIBRARY = "libcuda.so.1"

_OUT_OF_MEMORY = 2
_NON_BLOCKING = 1
_LAZY_PEER = 1  # enables access between GPUs where it is needed


class DeviceSegment:
    """As ``segments.Segment``, of a GPU: no process of this host maps it.  Its copies wait for nothing that others compute,
    so who reads must know that it was written."""

    name = None
    huge = False

    def __init__(self, nbytes: int, incarnation: int, device: int) -> None:
        """Zeroed.  Blocks for milliseconds.  Raises OutOfMemory, BackendUnavailable."""
        self.nbytes = nbytes
        self.mapped_nbytes = mark_offset(nbytes) + MARK_NBYTES
        self.device = device
        self._driver = driver()
        self._context = c_void_p()
        self._copying = threading.Lock()
        self._check("no such GPU", self._driver.cuDevicePrimaryCtxRetain(byref(self._context), self._handle()))
        address, stream = c_uint64(), c_void_p()
        try:
            with self._current():
                status = self._driver.cuMemAlloc_v2(byref(address), self.mapped_nbytes)
                if status == _OUT_OF_MEMORY:
                    raise OutOfMemory(f"GPU {device} has no {nbytes} bytes left for a region; make it smaller")
                self._check(f"{nbytes} bytes cannot be had", status)
                self._check("clearing", self._driver.cuMemsetD8_v2(address, 0, self.mapped_nbytes))
                self._check("clearing", self._driver.cuCtxSynchronize())
                self._check("a stream", self._driver.cuStreamCreate(byref(stream), _NON_BLOCKING))
        except BaseException:
            if address.value:
                with self._current():
                    self._driver.cuMemFree_v2(address)
            self._driver.cuDevicePrimaryCtxRelease_v2(self._handle())
            raise
        self.address, self._stream = address.value, stream
        self._write_mark(incarnation)

    def fetch(self, offsets: Sequence[int], size: int) -> memoryview:
        """Copies of ``size`` bytes from each offset, behind each other, in the host's memory.  Blocks; any thread."""
        copy = (c_ubyte * (len(offsets) * size))()
        with self._copying, self._current():
            for place, offset in enumerate(offsets):
                to = ctypes.addressof(copy) + place * size
                status = self._driver.cuMemcpyDtoHAsync_v2(to, self.address + offset, size, self._stream)
                self._check("reading", status)
            self._check("reading", self._driver.cuStreamSynchronize(self._stream))
        return memoryview(copy).cast("B")

    def export(self) -> bytes:
        """What ``open_exported`` takes, in another process of this host."""
        handle = _IpcHandle()
        with self._current():
            self._check("exporting", self._driver.cuIpcGetMemHandle(byref(handle), self.address))
        return bytes(handle)

    def give_up(self) -> None:
        """Peers that ask for its mark are told.  Idempotent."""
        if self.mapped_nbytes:
            self._write_mark(0)

    def unmap(self) -> None:
        """Gives the memory back; again does nothing."""
        if not self.mapped_nbytes:
            return
        self.mapped_nbytes = 0
        with self._current():
            self._driver.cuStreamDestroy_v2(self._stream)
            self._driver.cuMemFree_v2(c_uint64(self.address))
        self._driver.cuDevicePrimaryCtxRelease_v2(self._handle())

    def _write_mark(self, incarnation: int) -> None:
        mark = c_uint64(incarnation)
        with self._current():
            status = self._driver.cuMemcpyHtoD_v2(self.address + mark_offset(self.nbytes), byref(mark), 8)
        self._check("marking", status)

    def _handle(self) -> c_int:
        handle = c_int()
        self._check("no such GPU", self._driver.cuDeviceGet(byref(handle), self.device))
        return handle

    @contextmanager
    def _current(self) -> Iterator[None]:
        """The device's context is this thread's, and then again what was."""
        self._check("its context", self._driver.cuCtxPushCurrent_v2(self._context))
        try:
            yield
        finally:
            self._driver.cuCtxPopCurrent_v2(byref(c_void_p()))

    def _check(self, what: str, status: int) -> None:
        if status:
            raise TransportError(f"GPU {self.device}: {what}: {_text(self._driver, status)}")


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", c_ubyte * 64),)


def open_exported(device: int, handle: bytes) -> int:
    """The address, in this process, of another's memory on that GPU; it stays until the process ends.  Raises
    TransportError."""
    lib, number, context, address = driver(), c_int(), c_void_p(), c_uint64()

    def check(what: str, status: int) -> None:
        if status:
            raise TransportError(f"GPU {device}: memory of another process: {what}: {_text(lib, status)}")

    check("no such GPU", lib.cuDeviceGet(byref(number), device))
    check("its context", lib.cuDevicePrimaryCtxRetain(byref(context), number))
    check("its context", lib.cuCtxPushCurrent_v2(context))
    try:
        exported = _IpcHandle.from_buffer_copy(handle)
        check("opening", lib.cuIpcOpenMemHandle_v2(byref(address), exported, _LAZY_PEER))
    except BaseException:
        lib.cuDevicePrimaryCtxRelease_v2(number)
        raise
    finally:
        lib.cuCtxPopCurrent_v2(byref(c_void_p()))
    return address.value


def device_count() -> int:
    """GPUs that this process may use; 0 where there is no driver."""
    count = c_int()
    try:
        driver().cuDeviceGetCount(byref(count))
    except BackendUnavailable:
        return 0
    return count.value


@functools.cache
def driver() -> ctypes.CDLL:
    """Raises BackendUnavailable with what to do."""
    try:
        lib = ctypes.CDLL(LIBRARY)
    except OSError as e:
        raise BackendUnavailable(f"the CUDA driver does not load ({e}); install it, or use --device cpu") from e
    pointer, context = POINTER(c_uint64), POINTER(c_void_p)
    for name, arguments in (
        ("cuInit", [c_uint]),
        ("cuDeviceGetCount", [POINTER(c_int)]),
        ("cuDeviceGet", [POINTER(c_int), c_int]),
        ("cuDevicePrimaryCtxRetain", [context, c_int]),
        ("cuDevicePrimaryCtxRelease_v2", [c_int]),
        ("cuCtxPushCurrent_v2", [c_void_p]),
        ("cuCtxPopCurrent_v2", [context]),
        ("cuCtxSynchronize", []),
        ("cuMemAlloc_v2", [pointer, c_size_t]),
        ("cuMemFree_v2", [c_uint64]),
        ("cuMemsetD8_v2", [c_uint64, c_ubyte, c_size_t]),
        ("cuMemcpyHtoD_v2", [c_uint64, c_void_p, c_size_t]),
        ("cuMemcpyDtoHAsync_v2", [c_void_p, c_uint64, c_size_t, c_void_p]),
        ("cuStreamCreate", [context, c_uint]),
        ("cuStreamSynchronize", [c_void_p]),
        ("cuStreamDestroy_v2", [c_void_p]),
        ("cuIpcGetMemHandle", [POINTER(_IpcHandle), c_uint64]),
        ("cuIpcOpenMemHandle_v2", [pointer, _IpcHandle, c_uint]),
        ("cuGetErrorString", [c_int, POINTER(c_char_p)]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = c_int, arguments
    if status := lib.cuInit(0):
        raise BackendUnavailable(f"the CUDA driver does not start ({_text(lib, status)}); or use --device cpu")
    return lib


def _text(lib: ctypes.CDLL, status: int) -> str:
    text = c_char_p()
    lib.cuGetErrorString(status, byref(text))
    return (text.value or b"unknown error").decode() + f" ({status})"
