"""A cluster on this machine: one process per member, watched, restarted and stopped together."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import grpc

from kvferry.cli import leash
from kvferry.cli.members import ClusterConfig, ClusterError, Member, Role, clone_root, plan
from kvferry.cli.service_tls import open_service_channel

HEALTH_WATCH = "/grpc.health.v1.Health/Watch"
SERVING = b"\x08\x01"
LOG_TAIL_LINES = 12
_RECONNECT_S = 0.1


@dataclass(frozen=True, slots=True)
class Timing:
    """``start_s`` bounds the start of the whole cluster, ``stop_s`` how long each member may take to end after
    SIGTERM.  A member that dies comes back after ``backoff_s``, doubled for each death in a row up to
    ``max_backoff_s``; having lived ``steady_s`` ends the row."""

    start_s: float = 180.0
    stop_s: float = 25.0  # the services let running requests finish for 20 s
    backoff_s: float = 0.5
    max_backoff_s: float = 10.0
    steady_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Ready:
    name: str
    pid: int
    after_s: float


@dataclass(frozen=True, slots=True)
class Died:
    """``restart_in_s`` is None when it will not be started again."""

    name: str
    status: int
    log_tail: tuple[str, ...]
    restart_in_s: float | None


@dataclass(frozen=True, slots=True)
class Restarted:
    name: str
    pid: int


@dataclass(frozen=True, slots=True)
class Added:
    """One more member starts; ``Ready`` follows, or ``Died``."""

    name: str


@dataclass(frozen=True, slots=True)
class Leaving:
    """It finishes what it has; ``Stopped`` follows."""

    name: str


@dataclass(frozen=True, slots=True)
class Stopped:
    """``killed``: it had to be, because it did not end in time."""

    name: str
    status: int
    killed: bool


Event = Ready | Died | Restarted | Added | Leaving | Stopped

_LAST_TO_STOP = (Role.DIRECTORY, Role.PREFILL, Role.DECODE, Role.GATEWAY, Role.PLANNER)


class LocalCluster:
    """Starts ``members`` as processes, in order; restarts whichever dies; stops them in reverse order.

    Each has a session of its own, so a terminal's Ctrl-C does not reach it, and dies with this process even when that
    is killed.  Output goes to ``log_dir/<name>.log``.  ``on_event`` is called from several threads, one call at a time,
    and must not call back.  With ``restart`` False the dead stay dead.  A member that dies during the start ends the
    start.
    """

    def __init__(
        self,
        members: Sequence[Member],
        log_dir: Path,
        *,
        grpc_address: str = "",
        http_url: str = "",
        on_event: Callable[[Event], None] = lambda event: None,
        restart: bool = True,
        timing: Timing | None = None,
        make_worker: Callable[[Role, int], Member] | None = None,
    ) -> None:
        self.log_dir = log_dir
        self.make_worker = make_worker  # as of a Plan
        self.grpc_address = grpc_address
        self.http_url = http_url
        self._on_event = on_event
        self._event_lock = threading.Lock()
        self._timing = timing or Timing()
        self._restart = restart
        self._children = {m.name: _Child(m, log_dir / f"{m.name}.log", self) for m in members}
        self._stopping = threading.Event()
        self._starting = False
        self._lock = threading.Lock()
        self._failed: Died | None = None
        self._health_watch: grpc.Call | None = None
        self._log_lock: IO[str] | None = None

    @classmethod
    def from_config(
        cls,
        config: ClusterConfig,
        *,
        log_dir: Path | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
        restart: bool = True,
        timing: Timing | None = None,
    ) -> LocalCluster:
        """The cluster that ``config`` describes, from the clone around this package.  Nothing is started.  Raises
        ClusterError without a clone and PortError when a port is taken."""
        root = clone_root()
        planned = plan(config, root)
        return cls(
            planned.members,
            log_dir or root / "build" / "logs",
            grpc_address=planned.grpc_address,
            http_url=planned.http_url,
            on_event=on_event,
            restart=restart,
            timing=timing,
            make_worker=planned.make_worker,
        )

    @property
    def members(self) -> tuple[Member, ...]:
        return tuple(child.member for child in self._known())

    def address(self, name: str) -> str:
        """Where the member's gRPC server listens."""
        address = self._children[name].member.health_address
        assert address is not None, f"{name} has no gRPC server"
        return address

    def doing(self, name: str) -> str:
        """What the member said last, in a few words; empty before its first."""
        return self._children[name].doing()

    def pid(self, name: str) -> int | None:
        """None while it does not run."""
        return self._children[name].pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Starts all and returns when all are ready.  On failure, or when interrupted, nothing is left running;
        ClusterError names the member at fault."""
        began = time.monotonic()
        self.log_dir.mkdir(parents=True, exist_ok=True)
        self._lock_log_dir()
        self._starting = True
        try:
            for child in self._children.values():
                child.start()
            for child in self._children.values():
                pid = self._await_ready(child, began + self._timing.start_s)
                self._emit(Ready(child.member.name, pid, time.monotonic() - began))
            with self._lock:
                self._starting = False
                self._raise_if_failed()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """SIGTERM in reverse order, workers that were added later with the others; each waited for, SIGKILL for those that
        do not end.  Idempotent."""
        with self._lock:
            self._stopping.set()
        in_order = sorted(self._known(), key=lambda child: _LAST_TO_STOP.index(child.member.role))
        for child in reversed(in_order):
            child.stop(self._timing.stop_s)
        if self._log_lock is not None:
            self._log_lock.close()
            self._log_lock = None

    def _lock_log_dir(self) -> None:
        """Two clusters that wrote into the same files would leave neither readable.  Ends with the process."""
        lock = (self.log_dir / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            message = f"another cluster keeps its logs in {self.log_dir}; stop it or choose another with --log-dir"
            raise ClusterError(message) from error
        self._log_lock = lock

    def kill_now(self) -> None:
        """SIGKILL to all at once; :meth:`stop` then returns soon.  May be called while another thread stops."""
        self._stopping.set()
        for child in self._known():
            child.send_signal(signal.SIGKILL)

    def add(self, member: Member) -> None:
        """Starts one more, of a name that no other has; supervised like the others.  Returns without waiting for it.  Does
        nothing in a cluster that stops."""
        child = _Child(member, self.log_dir / f"{member.name}.log", self)
        with self._lock:
            assert member.name not in self._children, f"there is a {member.name} already"
            if self._stopping.is_set():
                return
            self._children[member.name] = child
            child.start()
        self._emit(Added(member.name))
        threading.Thread(target=self._tell_ready, args=(child,), name=f"start-{member.name}", daemon=True).start()

    def retire(self, name: str, drain: Callable[[], None]) -> None:
        """Ends a member for good: ``drain`` first, which returns when it holds nothing or has had its time, then SIGTERM.
        From now on it is not started again.  Blocks until it has ended, which it must within ``stop_s`` of the
        signal or is killed; stopping the cluster ends it sooner."""
        child = self._children[name]
        child.retiring.set()
        self._emit(Leaving(name))
        drain()
        child.send_signal(signal.SIGTERM)
        killed = not child.wait_over(self._timing.stop_s)
        if killed:
            child.send_signal(signal.SIGKILL)
            child.wait_over(self._timing.stop_s)
        with self._lock:
            if self._stopping.is_set():
                return  # whoever stops tells of it
            del self._children[name]
        if child.status is not None:
            self._emit(Stopped(name, child.status, killed))

    def _tell_ready(self, child: _Child) -> None:
        began = time.monotonic()
        try:
            pid = self._await_ready(child, began + self._timing.start_s)
        except ClusterError:
            return  # it stops, or dies and comes back, which is told
        self._emit(Ready(child.member.name, pid, time.monotonic() - began))

    def _known(self) -> list[_Child]:
        with self._lock:
            return list(self._children.values())

    def kill(self, name: str, signum: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to one member, and leaves the consequences to supervision.  After SIGKILL returns when the
        process has ended, so that a following :meth:`wait_ready` speaks of the next."""
        child = self._children[name]
        pid = child.pid
        child.send_signal(signum)
        if signum is signal.SIGKILL and pid is not None:
            child.wait_ended(pid, self._timing.stop_s)

    def wait_ready(self, name: str, timeout_s: float) -> None:
        """Blocks until the member is ready, say after a restart; ClusterError when it is not in time."""
        self._await_ready(self._children[name], time.monotonic() + timeout_s)

    def _await_ready(self, child: _Child, deadline: float) -> int:
        """Of whichever process bears the name: one that ends meanwhile is waited for to be followed."""
        while (pid := self._await_serving(child, deadline)) is None:
            if time.monotonic() >= deadline:
                raise ClusterError(
                    f"{child.member.name} was not ready in time; log: {child.log_path}", child.log_tail()
                )
            time.sleep(_RECONNECT_S)
        return pid

    def _await_serving(self, child: _Child, deadline: float) -> int | None:
        """None when it has ended, or does not serve in time.  Waits without polling: on the member's process, then on its
        health service's own watch stream."""
        name, address = child.member.name, child.member.health_address
        pid = child.wait_running(deadline)
        with self._lock:
            self._raise_if_failed()
        if pid is None:
            raise ClusterError(f"{name} was not running in time")
        if address is None:
            return pid
        member = child.member
        with open_service_channel(address, member.tls, member.certificate_role, _HEALTH_OPTIONS) as channel:
            method: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(HEALTH_WATCH)
            watch = method(b"", timeout=max(deadline - time.monotonic(), 0.001), wait_for_ready=True)
            with self._lock:
                self._raise_if_failed()
                self._health_watch = watch
            try:
                for reply in watch:
                    if reply == SERVING:
                        return pid
            except grpc.RpcError:
                pass  # the deadline, or the cancellation by which _died() interrupts
            finally:
                with self._lock:
                    self._health_watch = None
                watch.cancel()
        with self._lock:
            self._raise_if_failed()
        return None

    def _raise_if_failed(self) -> None:
        if self._failed is not None:
            died = self._failed
            log_path = self._children[died.name].log_path
            raise ClusterError(f"{died.name} {describe_status(died.status)} during the start; log: {log_path}",
                               died.log_tail)  # fmt: skip

    def _emit(self, event: Event) -> None:
        with self._event_lock:
            self._on_event(event)

    def _died(self, child: _Child, status: int, lived_s: float) -> float | None:
        """Called by the child's thread; the pause in seconds before its restart, or None for none."""
        with self._lock:
            failed_start = self._starting
            restart = self._restart and not failed_start
            backoff_s = child.next_backoff_s(lived_s, self._timing) if restart else None
            died = Died(child.member.name, status, child.log_tail(), backoff_s)
            if failed_start and self._failed is None:
                self._failed = died
                if self._health_watch is not None:
                    self._health_watch.cancel()
        if not failed_start:  # the start raises instead
            self._emit(died)
        return backoff_s


class _Child:
    """One member's process and the thread that starts it, waits for it and starts it again.

    The thread outlives each process that it starts: the kernel ends a process with the *thread* that made it.  The
    process is reaped under the lock that guards sending signals, so a signal never goes to a stranger with its pid.
    """

    def __init__(self, member: Member, log_path: Path, cluster: LocalCluster) -> None:
        self.member = member
        self.log_path = log_path
        self._cluster = cluster
        self._process: subprocess.Popen[bytes] | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._over = False
        self._status: int | None = None
        self._backoff_s = 0.0
        self.retiring = threading.Event()

    @property
    def pid(self) -> int | None:
        with self._changed:
            return None if self._process is None else self._process.pid

    def start(self) -> None:
        self.log_path.write_bytes(b"")
        self._thread = threading.Thread(target=self._run, name=f"supervise-{self.member.name}", daemon=True)
        self._thread.start()

    def wait_running(self, deadline: float) -> int | None:
        """Blocks until the process exists; None when it will not, or not in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._process is not None or self._over, deadline - time.monotonic())
            return None if self._process is None else self._process.pid

    def wait_ended(self, pid: int, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._process is None or self._process.pid != pid, timeout_s)

    @property
    def status(self) -> int | None:
        """How it ended last; None where it never has."""
        return self._status

    def wait_over(self, timeout_s: float) -> bool:
        """Blocks until it has ended and will not be started again; whether it has."""
        with self._changed:
            return self._changed.wait_for(lambda: self._over, timeout_s)

    def send_signal(self, signum: signal.Signals) -> None:
        with self._changed:
            if self._process is None:
                return
            if signum is signal.SIGKILL:
                os.killpg(self._process.pid, signum)  # what it has started too
            else:
                os.kill(self._process.pid, signum)  # Popen.send_signal would reap it behind the thread's back

    def stop(self, grace_s: float) -> None:
        """Call with the cluster stopping."""
        if self._thread is None:
            return
        with self._changed:
            ran = self._process is not None
        self.send_signal(signal.SIGTERM)
        self._thread.join(grace_s)
        killed = self._thread.is_alive()
        if killed:
            self.send_signal(signal.SIGKILL)
            self._thread.join(grace_s)
        self._thread = None
        if ran and self._status is not None:
            self._cluster._emit(Stopped(self.member.name, self._status, killed))

    def next_backoff_s(self, lived_s: float, timing: Timing) -> float:
        grown_s = 0.0 if lived_s >= timing.steady_s else 2 * self._backoff_s
        self._backoff_s = min(max(grown_s, timing.backoff_s), timing.max_backoff_s)
        return self._backoff_s

    def log_tail(self) -> tuple[str, ...]:
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 32_768))
                text = log.read().decode(errors="replace")
        except OSError:
            return ()
        return tuple(deque(map(readable, text.splitlines()), LOG_TAIL_LINES))

    def doing(self) -> str:
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
                lines = log.read().splitlines()
        except OSError:
            return ""
        return next((words for line in reversed(lines) if (words := in_few_words(line))), "")

    def _run(self) -> None:
        restarting = False
        try:
            while not self._cluster._stopping.is_set() and not self.retiring.is_set():
                began = time.monotonic()
                process = self._spawn()
                if process is None:
                    return
                if restarting:
                    self._cluster._emit(Restarted(self.member.name, process.pid))
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
                with self._changed:
                    status = self._status = process.wait()
                    self._process = None
                    self._changed.notify_all()
                if self._cluster._stopping.is_set() or self.retiring.is_set():
                    return
                backoff_s = self._cluster._died(self, status, time.monotonic() - began)
                if backoff_s is None or self._cluster._stopping.wait(backoff_s):
                    return
                restarting = True
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()

    def _spawn(self) -> subprocess.Popen[bytes] | None:
        command = (sys.executable, "-I", "-S", leash.__file__, str(os.getpid()), *self.member.command)
        with self.log_path.open("ab") as log, self._changed:
            # Under the lock: stop() and retire() signal either this process or none.
            if self._cluster._stopping.is_set() or self.retiring.is_set():
                return None
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.member.cwd,
                env={**os.environ, **self.member.environment},
                start_new_session=True,
            )
            self._changed.notify_all()
            return self._process


def describe_status(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def readable(line: str) -> str:
    """A line of a log as a person would want it: structured ones reduced to level, event and the exception's end."""
    try:
        record = json.loads(line)
    except ValueError:
        return line
    if not isinstance(record, dict) or "event" not in record:
        return line
    words = [str(record.get("level", "")), str(record["event"])]
    exception = str(record.get("exception", "")).strip()
    if exception:
        words.append(f"({exception.splitlines()[-1]})")
    return " ".join(filter(None, words))


def in_few_words(line: str | bytes) -> str:
    """The event of a structured line of a log, and how far it has come where it says so; empty for any other line."""
    try:
        record = json.loads(line)
    except ValueError:
        return ""
    if not isinstance(record, dict) or "event" not in record:
        return ""
    words = str(record["event"]).replace("_", " ")
    return f"{words}, {record['done']} of {record['total']}" if {"done", "total"} <= record.keys() else words


_HEALTH_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 1_000),  # how long a connection may take to be made
    ("grpc.max_reconnect_backoff_ms", 250),
]
