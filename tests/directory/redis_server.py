"""Debian's redis-server as the tests start it: on a free port of loopback, in a folder of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Self

import pytest
import redis

from kvferry.cli.ports import pick_free

START_TIMEOUT_S = 20.0


class RedisServer:
    """Owns the process.  Started by entering; ``kill`` and ``start`` are a crash and a return, with the data of before when
    ``persistent``, and ``pause`` is a machine that hangs."""

    def __init__(
        self, folder: Path, *options: str, persistent: bool = False, tls: tuple[Path, Path] | None = None
    ) -> None:
        """``tls``: certificate, which signs itself, and key."""
        found = shutil.which("redis-server") or shutil.which("valkey-server")
        if found is None:
            pytest.skip("neither redis-server nor valkey-server is installed; apt-get install redis-server")
        (self.port,) = pick_free(1, avoid=())
        self.url = f"redis://127.0.0.1:{self.port}/0"
        listen: tuple[str, ...] = ("--port", str(self.port))
        if tls is not None:
            self.url = f"rediss://127.0.0.1:{self.port}/0?ssl_ca_certs={tls[0]}"
            listen = ("--port", "0", "--tls-port", str(self.port), "--tls-cert-file", str(tls[0]), "--tls-key-file",
                      str(tls[1]), "--tls-ca-cert-file", str(tls[0]), "--tls-auth-clients", "no")  # fmt: skip
        self._folder = folder
        keep = ("--appendonly", "yes", "--appendfsync", "always") if persistent else ("--appendonly", "no")
        self._command = (
            found, *listen, "--bind", "127.0.0.1", "--save", "", *keep, "--dir", str(folder),
            "--loglevel", "warning", *options,
        )  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def client(self, **options: Any) -> redis.Redis:
        client: redis.Redis = redis.Redis.from_url(self.url, **options)
        return client

    def start(self, **options: Any) -> None:
        """``options`` are the client's, which waits until the server answers."""
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env={**os.environ, "LC_ALL": "C"})
        deadline_s = time.monotonic() + START_TIMEOUT_S
        with self.client(**options) as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    assert self._process.poll() is None, (self._folder / "redis.log").read_text()
                    assert time.monotonic() < deadline_s, "redis-server does not answer"
                    time.sleep(0.02)

    def kill(self) -> None:
        """Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
