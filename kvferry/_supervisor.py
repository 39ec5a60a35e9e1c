"""Asking the supervisor of a local cluster, `kvferry serve`, how many workers it keeps, and for others.

Over a socket of Unix in the folder of its logs, which its owner alone may write to: one line of JSON with the counts that
are wanted, such as ``{"prefill": 2}``, and one back, ``{"workers": {"prefill": 2, "decode": 1}}`` or ``{"error": "..."}``.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from kvferry import errors
from kvferry.types import WorkerRole

SOCKET_NAME = "control.sock"
MAX_LINE_NBYTES = 4096
TIMEOUT_S = 30.0


@contextmanager
def socket_path(folder: Path) -> Iterator[str]:
    """Of the socket in ``folder``, which may have a longer path than a socket's address holds.  Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET_NAME}"
    finally:
        os.close(descriptor)


def ask(folder: Path, counts: Mapping[WorkerRole, int] | None = None) -> dict[WorkerRole, int]:
    """Asks for ``counts``, and for nothing without.  How many of each role there are then: those that start count, those
    that leave do not.  Blocks, ``TIMEOUT_S`` at most in each operation.  Raises kvferry.Error."""
    request = json.dumps({role.value: count for role, count in (counts or {}).items()}) + "\n"
    try:
        with socket_path(folder) as path, socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(TIMEOUT_S)
            connection.connect(path)
            connection.sendall(request.encode())
            with connection.makefile("rb") as lines:
                answer = json.loads(lines.readline(MAX_LINE_NBYTES))
        if "error" in answer:
            raise errors.InvalidRequestError(str(answer["error"]))
        return {WorkerRole(role): int(count) for role, count in answer["workers"].items()}
    except PermissionError as error:
        raise errors.PermissionDeniedError(f"the cluster in {folder} belongs to somebody else: {error}") from error
    except TimeoutError as error:
        raise errors.DeadlineError(f"the supervisor in {folder} did not answer within {TIMEOUT_S} s") from error
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise errors.UnavailableError(
            f"no kvferry serve can be asked in {folder} ({error}); start one, or name its --log-dir"
        ) from error
