"""The supervisor's ear: a socket of Unix that its owner alone may write to (see ``kvferry._supervisor``)."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from kvferry import _supervisor, errors
from kvferry.types import WorkerRole

_READ_TIMEOUT_S = 5.0
_MAX_WORKERS = 256

Counts = dict[WorkerRole, int]


class Control:
    """While entered, answers one request at a time.  ``scale`` is called with what is asked for, on a thread of its own;
    what it raises of kvferry.Error is answered."""

    def __init__(self, folder: Path, scale: Callable[[Mapping[WorkerRole, int]], Counts]) -> None:
        """``folder`` belongs to this process alone: a socket that lies there is left over from another."""
        self._folder, self._scale = folder, scale
        self._closing = threading.Event()

    def __enter__(self) -> Self:
        """Raises OSError."""
        self._socket = socket.socket(socket.AF_UNIX)
        with _supervisor.socket_path(self._folder) as path:
            with suppress(FileNotFoundError):
                os.unlink(path)
            self._socket.bind(path)
            os.chmod(path, 0o600)
        self._socket.listen(8)  # only now: before, whoever tries is refused
        self._thread = threading.Thread(target=self._serve, name="control", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._socket.close()
        with suppress(OSError):
            (self._folder / _supervisor.SOCKET_NAME).unlink()
        self._thread.join(_READ_TIMEOUT_S)

    def _serve(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._socket.accept()
            except OSError:
                if self._closing.wait(0.1):
                    return
                continue
            with connection, suppress(OSError):
                connection.settimeout(_READ_TIMEOUT_S)
                with connection.makefile("rb") as lines:
                    answer = self._answer(lines.readline(_supervisor.MAX_LINE_NBYTES))
                connection.sendall(json.dumps(answer).encode() + b"\n")

    def _answer(self, line: bytes) -> dict[str, object]:
        try:
            counts = self._scale(parse(line))
        except errors.Error as error:
            return {"error": error.message}
        return {"workers": {role.value: count for role, count in counts.items()}}


def parse(line: bytes) -> Counts:
    """Raises InvalidRequestError."""
    try:
        asked = json.loads(line)
        counts = {WorkerRole(role): count for role, count in asked.items()}
    except (ValueError, AttributeError) as error:
        raise errors.InvalidRequestError(f"this is no request for workers ({error})") from error
    for role, count in counts.items():
        least = 1 if role is WorkerRole.DECODE else 0
        if type(count) is not int or not least <= count <= _MAX_WORKERS or role is WorkerRole.UNKNOWN:
            raise errors.InvalidRequestError(f"{role.value}={count}: write {least} to {_MAX_WORKERS} workers")
    return counts
