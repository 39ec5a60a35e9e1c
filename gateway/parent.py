"""The parent of a gateway's processes: starts them, starts again whichever ends, and passes on that they are to end.  It
serves nothing itself."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from asyncio.subprocess import Process
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog
from prometheus_client.multiprocess import mark_process_dead

import kvferry
from gateway.config import GatewayConfig
from gateway.seat import Seat
from services.runtime.backoff import Backoff
from services.runtime.server import reserve
from services.runtime.startup import StartupError

log = structlog.get_logger(__name__)

RESTART_BACKOFF_S = (0.5, 10.0)
# Whoever has lived for so long starts anew with the shortest wait.
STEADY_S = 30.0
# Beyond --drain-timeout-s: what the servers' own ends may take.
STOP_MARGIN_S = 8.0
LEASH = Path(kvferry.__file__).parent / "cli" / "leash.py"
_PREFIX = "kvferry-gateway-"
_SHARED_MEMORY = Path("/dev/shm")
_MAX_SOCKET_PATH = 107
_LOCK = "lock"


@dataclass(slots=True)
class Child:
    process: Process
    listening: asyncio.Task[bool]  # whether it came to that
    began_s: float


async def run_processes(config: GatewayConfig, options: Sequence[str]) -> None:
    """A gateway of ``config.processes`` processes, each with the same ``options``, until cancelled; then lets them drain.
    Raises StartupError when the first of them does not come to listen; the others begin after it.

    They die with this process, however it ends.
    """
    with ExitStack() as held:
        for address, flag in ((config.listen, "--listen"), (config.http_listen, "--http-listen")):
            held.enter_context(_claimed(address, flag))
        folder = held.enter_context(meeting_place(config.processes))
        command = (sys.executable, "-m", "gateway.process")
        crew = Crew(command, options, [Seat(number, config.processes, folder) for number in range(config.processes)])
        try:
            await crew.run()
        finally:
            await crew.stop(config.drain_timeout_s + STOP_MARGIN_S)


class Crew:
    """The processes.  ``command`` is called with number, folder, descriptor and ``options`` (``gateway.process``)."""

    def __init__(self, command: Sequence[str], options: Sequence[str], seats: Sequence[Seat]) -> None:
        self._command = command
        self._options = options
        self._seats = seats
        self._children: dict[int, Child] = {}
        self._keeping: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        """Until cancelled."""
        first, *others = self._seats
        child = await self._start(first)
        if not await child.listening:
            status = await child.process.wait()
            raise StartupError(f"its first process ended with status {status} before it listened; the log says why")
        self._keeping = [asyncio.create_task(self._keep(first, child))]
        self._keeping += [asyncio.create_task(self._keep(seat, None)) for seat in others]
        done, _ = await asyncio.wait(self._keeping, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()

    async def stop(self, timeout_s: float) -> None:
        """SIGTERM to all at once; SIGKILL to those that have not ended in time."""
        for task in self._keeping:
            task.cancel()
        await asyncio.gather(*self._keeping, return_exceptions=True)
        children = [child for child in self._children.values() if child.process.returncode is None]
        for child in children:
            _signal(child, signal.SIGTERM)
        ending = [asyncio.create_task(child.process.wait()) for child in children]
        if ending:
            _, late = await asyncio.wait(ending, timeout=timeout_s)
            if late:
                log.warning("processes_killed", processes=len(late))
                for child in children:
                    _signal(child, signal.SIGKILL)
            await asyncio.gather(*ending)
        for child in self._children.values():
            child.listening.cancel()
        await asyncio.gather(*(child.listening for child in self._children.values()), return_exceptions=True)

    async def _keep(self, seat: Seat, child: Child | None) -> None:
        backoff = Backoff(*RESTART_BACKOFF_S)
        while True:
            child = child or await self._start(seat)
            status = await child.process.wait()
            if time.monotonic() - child.began_s >= STEADY_S:
                backoff.reset()
            pause_s = backoff.next_s()
            log.warning("process_ended", process=seat.number, pid=child.process.pid, status=status,
                        restart_in_s=round(pause_s, 2))  # fmt: skip
            mark_process_dead(seat.number, str(seat.metrics))  # type: ignore[no-untyped-call]
            child = None
            await asyncio.sleep(pause_s)

    async def _start(self, seat: Seat) -> Child:
        reader, writer = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                # In a session of its own: a terminal's Ctrl-C is this process's to pass on.
                sys.executable, "-I", "-S", LEASH, str(os.getpid()), *self._command, str(seat.number), seat.folder,
                str(writer), *self._options, stdin=asyncio.subprocess.DEVNULL, pass_fds=(writer,),
                start_new_session=True,
            )  # fmt: skip
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        child = Child(process, asyncio.create_task(_byte_came(reader)), time.monotonic())
        self._children[seat.number] = child
        log.info("process_started", process=seat.number, pid=process.pid)
        return child


def _signal(child: Child, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        child.process.send_signal(number)


async def _byte_came(reader: int) -> bool:
    """False: nobody is left who could send one.  Closes ``reader``."""
    loop, came = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(reader, came.set)
    try:
        await came.wait()
        return os.read(reader, 1) != b""
    finally:
        loop.remove_reader(reader)
        os.close(reader)


@contextmanager
def _claimed(address: str, flag: str) -> Iterator[None]:
    """Nobody but the processes of this gateway listens on ``address`` while entered, though ports are shared among all
    of a user's processes that ask for it.  Raises StartupError."""
    # A name that ends with the process, of this network as ports are.
    with socket.socket(socket.AF_UNIX) as name:
        try:
            name.bind(f"\0kvferry-gateway-{address}")
        except OSError:
            message = f"address {address} is in use by another gateway; choose another with {flag}"
            raise StartupError(message) from None
        reserve(address, flag).close()  # or somebody who does not share it
        with reserve(address, flag, share_port=True):
            yield


@contextmanager
def meeting_place(num_processes: int) -> Iterator[Path]:
    """A folder of this user's alone, in memory where there is such a file system.  Removes what parents that were killed
    have left.  Raises StartupError."""
    parent = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
    try:
        _remove_abandoned(parent)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    except OSError as error:
        raise StartupError(f"--processes needs a folder to write to, and {parent} is none: {error.strerror}") from error
    try:
        seat = Seat(num_processes - 1, num_processes, folder)
        if len(os.fsencode(seat.socket)) > _MAX_SOCKET_PATH:
            raise StartupError(f"{folder} is too long a name for sockets; set TMPDIR to a shorter one")
        seat.metrics.mkdir()
        seat.quotas.mkdir()
        with (folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    for lock in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        with suppress(OSError), lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
