"""A gRPC server for streams of many small messages."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Mapping
from typing import Any

from gateway.rpc import metadata
from gateway.rpc.call import Call
from gateway.rpc.connection import Connection
from gateway.rpc.limits import Limits
from services.runtime.interceptor import with_errors_mapped
from services.runtime.server import MAX_MESSAGE_NBYTES, reserve
from services.runtime.tls import Certificates

BACKLOG = 2048
_INVALID_ARGUMENT, _UNIMPLEMENTED = 3, 12


class RpcServer:
    """Serves what grpc.aio.Server does, to the same clients, as far as the gateway needs it: no compression, no client
    certificates.  Handlers are wrapped as ``RequestInterceptor`` wraps them; calls whose client takes nothing for
    ``write_timeout_s`` end.  Add servicers, then ``bind``, then ``start``.  Owned by the event loop."""

    def __init__(self, *, write_timeout_s: float | None = None, limits: Limits | None = None) -> None:
        self._write_timeout_s = write_timeout_s
        self._limits = limits or Limits(max_message_nbytes=MAX_MESSAGE_NBYTES)
        self._handlers: dict[str, Any] = {}
        self._connections: set[Connection] = set()
        self._listeners: list[tuple[socket.socket, ssl.SSLContext | None]] = []
        self._servers: list[asyncio.Server] = []

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """What generated code calls beside the next one, with the same handlers."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        for name, handler in handlers.items():
            path = f"/{service}/{name}"
            self._handlers[path] = with_errors_mapped(handler, path)

    def bind(
        self,
        address: str,
        *,
        certificates: Certificates | None = None,
        flag: str = "--listen",
        share_port: bool = False,
    ) -> int:
        """Takes ``address`` ("host:port", port 0 picks one), in the clear without ``certificates``, and returns the port.
        Raises StartupError, naming ``flag`` as the remedy, when that cannot be done."""
        listener = reserve(address, flag, share_port=share_port)
        context = None
        if certificates is not None:
            context = certificates.web_context()
            context.set_alpn_protocols(["h2"])
        self._listeners.append((listener, context))
        port: int = listener.getsockname()[1]
        return port

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        while self._listeners:
            listener, context = self._listeners.pop()
            server = await loop.create_server(self.connection, sock=listener, ssl=context, backlog=BACKLOG)
            self._servers.append(server)

    async def stop(self, grace_s: float | None) -> None:
        """Takes no more calls; those in progress have ``grace_s`` to end before they are cancelled."""
        for listener, _ in self._listeners:
            listener.close()
        for server in self._servers:
            server.close()
        connections = list(self._connections)
        for connection in connections:
            connection.close()
        tasks = {call.task for connection in connections for call in connection.calls.values()}
        if tasks:
            _, tasks = await asyncio.wait(tasks, timeout=grace_s)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for connection in list(self._connections):
            connection.hang_up()

    def connection(self) -> Connection:
        """For a client that has come."""
        connection = Connection(self._begin, self._limits, self._connections.discard)
        self._connections.add(connection)
        return connection

    def _begin(self, connection: Connection, stream_id: int, headers: metadata.Headers) -> Call | tuple[int, str]:
        given = dict(headers)
        path = given.get(":path", "")
        handler = self._handlers.get(path)
        if handler is None:
            return _UNIMPLEMENTED, f"there is no method {path}"
        try:
            timeout = given.get("grpc-timeout")
            timeout_s = None if timeout is None else metadata.timeout_s(timeout)
            received = metadata.incoming(headers)
        except ValueError as error:
            return _INVALID_ARGUMENT, str(error)
        return Call(
            connection, stream_id, handler, received, timeout_s=timeout_s, write_timeout_s=self._write_timeout_s,
            max_message_nbytes=self._limits.max_message_nbytes,
        )  # fmt: skip
