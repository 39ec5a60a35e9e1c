"""The processes of a tensor-parallel worker's further ranks: started, told of each step, watched, and ended."""

from __future__ import annotations

import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from kvferry.errors import InternalError
from services.engine.parallel.frames import FrameError, Kind, Pipe, Setup

log = structlog.get_logger(__name__)

SILENCE_TIMEOUT_S = 120.0  # while it starts, a rank says how far it is
SEND_TIMEOUT_S = 30.0
END_TIMEOUT_S = 5.0
# A rank's end is seen in two places, and the better reason may come a moment after the other.
REASON_TIMEOUT_S = 2.0


class RankLostError(InternalError):
    """A rank has ended or cannot go on, and so cannot the worker."""

    default_reason = "RANK_LOST"


@dataclass(slots=True, eq=False)
class _Rank:
    number: int
    process: subprocess.Popen[bytes]
    pipe: Pipe
    said: Kind = Kind.PROGRESS
    heard_s: float = 0.0


class Ranks:
    """A context manager.  The first rank is this process; its engine's thread calls ``tell``.

    Ranks end with this process, however it ends, and one that ends takes the others with it: what they have computed by
    then need not fit together."""

    def __init__(self, setups: Sequence[Setup], on_lost: Callable[[RankLostError], None]) -> None:
        """Starts a process for each, which begins to load its weights.  ``on_lost`` is called once, on any thread, when one
        of them is lost.  ``store`` of the setups is filled in here."""
        self._on_lost = on_lost
        self._size = len(setups) + 1
        self._changed = threading.Condition()
        self._lost: RankLostError | None = None
        self._closing = False
        self._folder = Path(tempfile.mkdtemp(prefix="kvferry-ranks-"))  # for this user alone
        self.store = self._folder / "store"
        self._ranks: list[_Rank] = []
        self._wake, woken = socket.socketpair()
        self._watcher = threading.Thread(target=self._watch, args=(woken,), name="ranks", daemon=True)
        try:
            for setup in setups:
                self._ranks.append(_start(replace(setup, store=str(self.store))))
        except BaseException:
            woken.close()
            self.close()
            raise
        self._watcher.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(rank.process.pid for rank in self._ranks)

    def join(self) -> None:
        """Blocks until all have loaded, and has them meet: this process must do the same now.  Raises RankLostError."""
        self._wait_for(Kind.LOADED)
        self._send(Kind.JOIN)

    def wait_ready(self) -> None:
        """Blocks until steps may come.  Raises RankLostError."""
        self._wait_for(Kind.READY)

    def tell(self, step: bytes) -> None:
        """Raises RankLostError."""
        self._send(Kind.STEP, step)

    def broken(self, error: Exception) -> RankLostError:
        """What the failure of a step here means: the ranks no longer agree, so all of them end."""
        with self._changed:
            self._changed.wait_for(lambda: self._lost is not None, REASON_TIMEOUT_S)
        return self._lose(f"rank 0 of {self._size} failed: {error}")

    def close(self) -> None:
        """Ends them, after the step under way; blocks for END_TIMEOUT_S at most.  Again does nothing."""
        with self._changed:
            self._closing = True
        self._wake.close()
        for rank in self._ranks:
            with suppress(OSError):
                rank.pipe.send(Kind.STOP)
        deadline_s = time.monotonic() + END_TIMEOUT_S
        for rank in self._ranks:
            try:
                rank.process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                rank.process.kill()
                rank.process.wait()
        if self._watcher.ident is not None:
            self._watcher.join(END_TIMEOUT_S)
        for rank in self._ranks:
            rank.pipe.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _send(self, kind: Kind, payload: bytes = b"") -> None:
        if self._lost is not None:
            raise self._lost
        for rank in self._ranks:
            try:
                rank.pipe.send(kind, payload)
            except OSError as e:
                raise self.broken(e) from e

    def _wait_for(self, kind: Kind) -> None:
        began_s = time.monotonic()
        with self._changed:
            while True:
                if self._lost is not None:
                    raise self._lost
                late = [rank for rank in self._ranks if rank.said is not kind]
                if not late:
                    return
                silent_s = time.monotonic() - max(began_s, min(rank.heard_s for rank in late))
                if silent_s >= SILENCE_TIMEOUT_S:
                    break
                self._changed.wait(SILENCE_TIMEOUT_S - silent_s)
        raise self._lose(f"rank {late[0].number} of {self._size} has said nothing for {SILENCE_TIMEOUT_S:.0f} s")

    def _watch(self, woken: socket.socket) -> None:
        with selectors.DefaultSelector() as selector, woken:
            selector.register(woken, selectors.EVENT_READ)
            for rank in self._ranks:
                selector.register(rank.pipe, selectors.EVENT_READ, rank)
            while True:
                for key, _ in selector.select():
                    if key.data is None:
                        return
                    if reason := self._hear(key.data):
                        self._lose(reason)
                        return

    def _hear(self, rank: _Rank) -> str | None:
        """Why it is lost, if it is."""
        name = f"rank {rank.number} of {self._size}"
        try:
            kind, payload = rank.pipe.receive()
        except (EOFError, OSError):
            with suppress(subprocess.TimeoutExpired):
                rank.process.wait(REASON_TIMEOUT_S)
            return self._ended(rank)
        except FrameError as e:
            return f"{name} said something else than agreed: {e}"
        if kind is Kind.FAILED:
            for other in self._ranks:  # whose end it may have failed of
                if other is not rank and other.process.poll() is not None:
                    return self._ended(other)
            return f"{name} failed: {payload.decode(errors='replace')}"
        with self._changed:
            rank.heard_s = time.monotonic()
            rank.said = kind
            self._changed.notify_all()
        if kind is not Kind.PROGRESS:
            log.info("rank", number=rank.number, pid=rank.process.pid, state=kind.name.lower())
        return None

    def _ended(self, rank: _Rank) -> str:
        return f"rank {rank.number} of {self._size} (process {rank.process.pid}) ended {_how(rank.process.returncode)}"

    def _lose(self, reason: str) -> RankLostError:
        """The first reason stays."""
        with self._changed:
            if self._lost is not None:
                return self._lost
            error = self._lost = RankLostError(f"{reason}; the worker cannot go on without it")
            closing = self._closing
            self._changed.notify_all()
        if not closing:
            log.error("rank_lost", reason=reason)
            for rank in self._ranks:  # whoever waits for it in a sum is freed by its end
                rank.process.kill()
            self._on_lost(error)
        return error


def _start(setup: Setup) -> _Rank:
    ours, theirs = socket.socketpair()
    ours.settimeout(SEND_TIMEOUT_S)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.worker.rank", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            process_group=0,  # a terminal's Ctrl-C is for the first rank, which drains
        )
    pipe = Pipe(ours)
    pipe.send(Kind.SETUP, setup.pack())
    log.info("rank", number=setup.rank, pid=process.pid, state="started")
    return _Rank(setup.rank, process, pipe, heard_s=time.monotonic())


def _how(returncode: int | None) -> str:
    if returncode is None:
        return "its part of the conversation"
    return f"by signal {-returncode}" if returncode < 0 else f"with status {returncode}"
