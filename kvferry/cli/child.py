"""A module of the clone that runs in a process of its own, for what the client alone cannot import."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from kvferry.cli import leash
from kvferry.cli.cluster import LOG_TAIL_LINES


@dataclass(frozen=True, slots=True)
class Ended:
    """``document``: all of stdout; ``said``: the last lines of stderr; ``status`` as of ``subprocess``."""

    document: str
    said: tuple[str, ...]
    status: int


def run(root: Path, arguments: Sequence[str], tell: Callable[[str], None], *, timeout_s: float | None) -> Ended:
    """``python -m`` with ``arguments``, in ``root``; ``tell`` is called with each line of stderr, on another thread.
    Killed after ``timeout_s``.  Whatever happens, it leaves no process behind."""
    said: deque[str] = deque(maxlen=LOG_TAIL_LINES)
    with subprocess.Popen(
        (sys.executable, "-I", "-S", leash.__file__, str(os.getpid()), sys.executable, "-m", *arguments),
        cwd=root, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        listener = threading.Thread(target=_listen, args=(process.stderr, said, tell))
        timer = threading.Timer(timeout_s or 0.0, _kill, (process,))
        listener.start()
        if timeout_s is not None:
            timer.start()
        try:
            document = process.stdout.read()
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        finally:
            _kill(process)  # not reaped yet, so the number is still its own
            timer.cancel()
            if timeout_s is not None:
                timer.join()
            listener.join()
        status = process.wait()
    return Ended(document, tuple(said), status)


def _kill(process: subprocess.Popen[str]) -> None:
    """With all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _listen(stream: IO[str], said: deque[str], tell: Callable[[str], None]) -> None:
    for line in stream:
        said.append(line.rstrip())
        tell(line.rstrip())
