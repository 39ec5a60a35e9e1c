"""What the first rank and another say to each other, as bytes, none of which is executed.  Both are processes of one
worker."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass
from enum import IntEnum
from socket import socket

import numpy as np

from services.engine.batch import Batch
from services.engine.sampling_params import Sample, Sampling

_HEAD = struct.Struct("<BI")  # kind, bytes that follow
_COUNTS = struct.Struct("<4I")  # tokens, sequences, entries of kv_indices, samples
MAX_NBYTES = 1 << 28


class Kind(IntEnum):
    SETUP = 1  # to a rank: a Setup
    JOIN = 2  # to a rank: all have loaded
    STEP = 3  # to a rank: a Batch
    STOP = 4  # to a rank: there are no more steps
    PROGRESS = 11  # from a rank: it is still loading
    LOADED = 12  # from a rank
    READY = 13  # from a rank: steps may come
    FAILED = 14  # from a rank, its last: a sentence


class FrameError(Exception):
    """The bytes are not a frame of ours."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a rank is told at its start.  ``pool``: how it gets at its region, in hex; ``device`` None is the CPU;
    ``compiled``, ``store``: see ``create_shard_runner``; ``cpus``: processors to compute on, none: any."""

    rank: int
    size: int
    model: str
    revision: str
    dtype: str
    block_size: int
    num_blocks: int
    max_running: int
    threads: int
    cpus: tuple[int, ...]
    device: int | None
    compiled: bool
    pool: str
    store: str
    log_name: str
    log_level: str
    returns_early: bool

    def pack(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def unpack(cls, payload: bytes) -> Setup:
        """Raises FrameError."""
        try:
            fields = json.loads(payload)
            return cls(**{**fields, "cpus": tuple(fields["cpus"])})
        except (ValueError, TypeError, KeyError) as e:
            raise FrameError(f"the set-up cannot be read: {e!r}") from e


class Pipe:
    """Frames over a connected stream socket.  One thread sends, one receives.  A context manager's owner closes it."""

    def __init__(self, connection: socket) -> None:
        self._socket = connection

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        """Blocks while the other does not read, as long as the socket's timeout says.  Raises OSError."""
        self._socket.sendall(_HEAD.pack(kind, len(payload)) + payload)

    def receive(self) -> tuple[Kind, bytes]:
        """Blocks.  Raises EOFError when the other has ended, FrameError, OSError."""
        number, nbytes = _HEAD.unpack(self._exactly(_HEAD.size))
        if nbytes > MAX_NBYTES:
            raise FrameError(f"a frame of {nbytes} bytes")
        payload = self._exactly(nbytes)
        try:
            return Kind(number), payload
        except ValueError as e:
            raise FrameError(f"no frame has number {number}") from e

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, nbytes: int) -> bytes:
        buffer = bytearray()
        while len(buffer) < nbytes:
            part = self._socket.recv(nbytes - len(buffer))
            if not part:
                raise EOFError("the other process has ended")
            buffer += part
        return bytes(buffer)


def pack_step(batch: Batch) -> bytes:
    """All that a rank which draws nothing needs of it."""
    rows = np.array([sample.row for sample in batch.samples], np.int32)
    counts = _COUNTS.pack(batch.num_tokens, batch.num_sequences, len(batch.kv_indices), len(rows))
    arrays = (batch.token_ids, batch.positions, batch.slots, batch.qo_indptr, batch.kv_indptr, batch.kv_indices,
              batch.kv_last_page_len, batch.kv_spare, rows)  # fmt: skip
    return counts + b"".join(array.tobytes() for array in arrays)


def unpack_step(payload: bytes) -> Batch:
    """The inverse of ``pack_step``, with samples that say no more than their rows.  Raises FrameError."""
    if len(payload) < _COUNTS.size:
        raise FrameError("a step without its counts")
    tokens, sequences, indices, samples = _COUNTS.unpack_from(payload)
    wide, narrow = (tokens,) * 3, (sequences + 1, sequences + 1, indices, sequences, sequences, samples)
    num_wide = sum(wide)
    if len(payload) != _COUNTS.size + 8 * num_wide + 4 * sum(narrow):
        raise FrameError(f"a step of {len(payload)} bytes, which is not what its counts make")
    # Copies: torch wants memory that may be written.
    numbers = np.frombuffer(payload, np.int64, num_wide, _COUNTS.size).copy()
    small = np.frombuffer(payload, np.int32, sum(narrow), _COUNTS.size + 8 * num_wide).copy()
    token_ids, positions, slots = np.split(numbers, 3)
    qo_indptr, kv_indptr, kv_indices, kv_last_page_len, kv_spare, rows = np.split(small, np.cumsum(narrow)[:-1])
    nothing = Sampling()
    return Batch(
        token_ids, positions, slots, qo_indptr, kv_indptr, kv_indices, kv_last_page_len, kv_spare,
        tuple(Sample(row, nothing, 0) for row in rows.tolist()),
    )  # fmt: skip
