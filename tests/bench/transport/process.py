"""A side, seen from the controlling process."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvferry.cli import leash
from tests.bench.transport.peers import Library

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT_S = 120


class SideFailed(Exception):
    pass


class Process:
    """A context manager; its end, or the end of this process, ends the side."""

    def __init__(
        self, library: Library, role: str, num_blocks: int, nbytes: int, environment: Mapping[str, str] | None = None
    ) -> None:
        self._who = f"{library.name}'s {role}"
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        side = [sys.executable, "-m", "tests.bench.transport.side", library.name, role, str(num_blocks), str(nbytes)]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", leash.__file__, str(os.getpid()), *side],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
        )

    def ask(self, do: str, **arguments: Any) -> Any:
        self.tell(do, **arguments)
        return self.hear()

    def tell(self, do: str, **arguments: Any) -> None:
        """One command at a time: ``hear`` its answer before the next."""
        assert self._process.stdin is not None
        self._asked = do
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}, default=list) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure("ended before") from None

    def hear(self) -> Any:
        """Raises SideFailed with the side's last words."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], TIMEOUT_S)[0]:
            raise self._failure(f"did not answer within {TIMEOUT_S} s to")
        if not (line := self._process.stdout.readline()):
            raise self._failure("ended during")
        return json.loads(line)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.go_on()
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._words.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _failure(self, what: str) -> SideFailed:
        self._words.seek(0)
        words = self._words.read().decode(errors="replace").strip().splitlines()[-8:]
        return SideFailed("\n  ".join([f"{self._who} {what} {self._asked!r}; its last words:", *words]))
