"""Packed weights on disk: written once by whoever packs them, then mapped read-only by every worker of the host, which so
has them in memory once.

A file is a line of JSON, then the numbers, each part at a multiple of 64 bytes.  Its name is a digest of all that its
content depends on; the instruction set is not part of that, for all of them read the same order.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog

from services.engine.kernels.packed import Numbers, PackedLayer, PackedMatrix, PackedWeights

log = structlog.get_logger(__name__)

_ENGINE = Path(__file__).parents[1]
# All that decides which bytes a model's weights become.
_SOURCES = (
    Path(__file__),
    *(_ENGINE / "kernels" / name for name in ("packing.py", "packed.py", "quantize.c")),
    *(_ENGINE / name for name in ("weights.py", "gguf_weights.py", "safetensors_weights.py", "rope.py")),
)

MAX_NBYTES = 32 << 30  # of all files together; those unused for longest go first
_ALIGNMENT = 64
_SUFFIX = ".packed"


def default_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvferry" / "weights"


def key(revision: str, dtype: str, files: list[Path]) -> str:
    """``revision`` is a sample of the content; size, time of change and inode tell of a file changed in between."""
    stats = [(str(path.resolve()), stat.st_ino, stat.st_size, stat.st_mtime_ns)
             for path in files for stat in [path.stat()]]  # fmt: skip
    return hashlib.sha256(json.dumps([packing_version(), revision, dtype, stats]).encode()).hexdigest()[:32]


@functools.cache
def packing_version() -> str:
    """Another one for every change of how weights are packed, so that what an older version packed is never mapped."""
    return hashlib.sha256(b"".join(source.read_bytes() for source in _SOURCES)).hexdigest()


def load_or_pack(folder: Path, name: str, pack: Callable[[], PackedWeights]) -> PackedWeights:
    """The weights of that name (see ``key``), mapped; packed and stored first where they are not there.  Of several
    processes one packs and the others wait.  Where the folder cannot be used, one line of log says why, and the weights
    are this process's own.  Raises what ``pack`` raises."""
    path = folder / f"{name}{_SUFFIX}"
    if weights := _load(path):
        return weights
    packed = None
    try:
        with _locked(folder, name):
            if weights := _load(path):
                return weights
            packed = pack()
            _store(path, packed)
        log.info("weights_cached", path=str(path), nbytes=path.stat().st_size)
        return _load(path) or packed
    except OSError as error:
        log.warning("weights_not_cached", folder=str(folder), reason=error.strerror or str(error))
        return packed or pack()


@dataclass(frozen=True, slots=True)
class _Mapped:
    """Part of a mapped file, which stays mapped for as long as this is there."""

    content: npt.NDArray[np.uint8]

    @property
    def nbytes(self) -> int:
        return self.content.nbytes

    def data_ptr(self) -> int:
        return int(self.content.ctypes.data)


def _load(path: Path) -> PackedWeights | None:
    """None where there is no such file, or one that is not whole, or not ours."""
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            if stat.st_uid != os.getuid():
                raise ValueError("another user's")
            header = json.loads(file.readline(1 << 20))
            if stat.st_size != header["nbytes"]:
                raise ValueError("not whole")
            # Large pages, where the file system has them in its cache.
            content = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
        weights = _restored(header, np.frombuffer(content, dtype=np.uint8))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("weights_cache_unreadable", path=str(path), reason=str(error))
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # used just now
    log.info("weights_mapped", path=str(path), nbytes=header["nbytes"])
    return weights


def _store(path: Path, weights: PackedWeights) -> None:
    """Atomically.  Raises OSError."""
    header = _described(weights)
    first = header["first"]
    _make_room(path.parent, header["nbytes"])
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}.", suffix=".partial")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(json.dumps(header).encode() + b"\n")
            for part, offset in zip(weights.parts(), header["offsets"], strict=True):
                file.seek(first + offset)
                file.write((ctypes.c_char * part.nbytes).from_address(part.data_ptr()))
            file.truncate(header["nbytes"])
            file.flush()
            os.fsync(file.fileno())  # a name that came before its content would be believed after a loss of power
        Path(partial).rename(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _described(weights: PackedWeights) -> dict[str, Any]:
    """All but the numbers.  ``offsets`` and ``sizes`` in bytes, of ``PackedWeights.parts``, counted from ``first``."""
    parts = list(weights.parts())
    offsets, end = [], 0
    for part in parts:
        offsets.append(end)
        end = _aligned(end + part.nbytes)
    header: dict[str, Any] = {
        "dtype": weights.dtype,
        "num_layers": len(weights.layers),
        "tied": weights.head is weights.embedding,
        "biased": bool(weights.layers) and weights.layers[0].qkv_bias is not None,
        "matrices": [[m.num_rows, m.num_columns, m.format, m.scales is not None] for m in weights.matrices()],
        "offsets": offsets,
        "sizes": [part.nbytes for part in parts],
    }
    header["first"] = first = _aligned(len(json.dumps(header)) + 64)
    header["nbytes"] = first + end
    return header


def _restored(header: dict[str, Any], content: npt.NDArray[np.uint8]) -> PackedWeights:
    """Raises ValueError, KeyError or TypeError for a header that does not fit its file."""
    first = header["first"]
    places = [(first + offset, size) for offset, size in zip(header["offsets"], header["sizes"], strict=True)]
    if any(begin < first or size < 0 or begin + size > len(content) for begin, size in places):
        raise ValueError("a part lies outside the file")
    parts: Iterator[Numbers] = (_Mapped(content[begin : begin + size]) for begin, size in places)
    shapes = iter(header["matrices"])

    def matrix() -> PackedMatrix:
        num_rows, num_columns, format, scaled = next(shapes)
        return PackedMatrix(next(parts), next(parts) if scaled else None, num_rows, num_columns, format)

    try:
        norm, frequencies = next(parts), next(parts)
        vectors = [
            (next(parts), next(parts), next(parts) if header["biased"] else None) for _ in range(header["num_layers"])
        ]
        embedding = matrix()
        head = embedding if header["tied"] else matrix()
        layers = [
            PackedLayer(attention, matrix(), bias, matrix(), mlp, matrix(), matrix())
            for attention, mlp, bias in vectors
        ]
    except StopIteration as error:
        raise ValueError("parts are missing") from error
    return PackedWeights(header["dtype"], embedding, tuple(layers), norm, head, frequencies)


def _make_room(folder: Path, nbytes: int) -> None:
    """Deletes what was unused for longest; processes that have it mapped keep it.  Raises OSError where that does not
    help."""
    files = [(path.stat(), path) for path in folder.glob(f"*{_SUFFIX}")]
    total = sum(stat.st_size for stat, _ in files) + nbytes
    for stat, path in sorted(files, key=lambda file: file[0].st_mtime):
        if total <= MAX_NBYTES:
            break
        path.unlink(missing_ok=True)
        total -= stat.st_size
    if total > MAX_NBYTES or shutil.disk_usage(folder).free < 2 * nbytes:
        raise OSError(f"no room for {nbytes} bytes")


@contextlib.contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / f"{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting_for_weights", folder=str(folder))  # another worker packs them
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
