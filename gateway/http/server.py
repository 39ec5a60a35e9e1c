"""The HTTP server, as a task of the running loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from functools import partial
from typing import cast

import uvicorn
from starlette.types import ASGIApp

from gateway.http.limits import MAX_HEAD_NBYTES
from gateway.http.slow_heads import BoundedHeads
from services.runtime.startup import cannot_listen
from services.runtime.tls import Certificates

# What a request may still take to say goodbye, once its grace is over and it was cancelled.
_CANCELLED_S = 2.0
HEAD_TIMEOUT_S = 10.0
# Between two requests; what a client's pool keeps for longer it must be ready to open anew.
IDLE_TIMEOUT_S = 5.0


class HttpServer:
    """Serves ``app`` in the loop that calls ``start``, over TLS where there are ``certificates``.  Signals are left to the
    process; ``start`` and ``stop`` are called once each, in this order.  A connection is closed on which no head of a
    request is complete ``head_timeout_s`` after it began, or that is idle for ``idle_timeout_s`` after a request."""

    def __init__(
        self, app: ASGIApp, certificates: Certificates | None = None, *, head_timeout_s: float = HEAD_TIMEOUT_S,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
    ) -> None:  # fmt: skip
        # httptools, which uvicorn would prefer where it is installed, bounds no head.
        config = uvicorn.Config(
            app, http=cast(type[asyncio.Protocol], partial(BoundedHeads, head_timeout_s=head_timeout_s)),
            lifespan="off", ws="none", access_log=False, log_config=None, server_header=False,
            h11_max_incomplete_event_size=MAX_HEAD_NBYTES,
        )  # fmt: skip
        # Despite its annotation the setting takes fractions: it goes into loop.call_later.
        config.timeout_keep_alive = idle_timeout_s  # type: ignore[assignment]
        if certificates is not None:
            # Its own options would read the files once, and never again.
            config.load()
            config.ssl = certificates.web_context()
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int, *, flag: str = "--http", share_port: bool = False) -> int:
        """Returns the port, chosen by the system when ``port`` is 0, once connections are accepted.  Raises StartupError,
        naming ``flag`` as the remedy, when the address cannot be had.  ``share_port``: with other processes, among which
        the kernel deals out connections."""
        assert self._task is None, "a server starts once"
        listener = await _listen(host, port, flag, share_port)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]), name="http server")
        listening = asyncio.create_task(self._server.listening.wait())
        await asyncio.wait((self._task, listening), return_when=asyncio.FIRST_COMPLETED)
        listening.cancel()
        if self._task.done():
            self._task.result()
        bound: int = listener.getsockname()[1]
        return bound

    async def stop(self, grace_s: float) -> None:
        """Accepts no more, closes idle connections, gives requests ``grace_s`` to end and cancels what is left: those
        clients are told that the gateway shuts down."""
        assert self._task is not None, "stop comes after start"
        # Despite its annotation the setting takes fractions: it goes into asyncio.wait_for.
        self._server.config.timeout_graceful_shutdown = grace_s  # type: ignore[assignment]
        self._server.should_exit = True
        await self._task
        if tasks := set(self._server.server_state.tasks):
            await asyncio.wait(tasks, timeout=_CANCELLED_S)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, saying when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


async def _listen(host: str, port: int, flag: str, share_port: bool) -> socket.socket:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, proto, _, where = found[0]
        listener = socket.socket(family, kind, proto)
        try:
            # A restart need not wait for the old connections' TIME_WAIT.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if share_port:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.setblocking(False)
            listener.bind(where)
            # With SO_REUSEADDR, only listening tells that another socket was bound as well but did not yet listen.
            listener.listen(2048)
        except OSError:
            listener.close()
            raise
        return listener
    except OSError as error:
        raise cannot_listen(error, address, flag) from error
