"""A channel whose certificates may change while it is open."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from services.runtime.tls import Certificates, Pem


class RenewedChannel(grpc.aio.Channel):
    """Calls go over a connection made with what ``certificates`` are when they begin.  One made with former ones stays
    until the calls on it have ended.  Owned by the event loop that it was opened in."""

    def __init__(self, certificates: Certificates, connect: Callable[[Pem], grpc.aio.Channel]) -> None:
        self._certificates = certificates
        self._connect = connect
        self._line = _Line(certificates.current, connect)
        self._former: set[_Line] = set()
        self._closing: set[asyncio.Task[None]] = set()

    def line(self) -> _Line:
        if (pem := self._certificates.current) is not self._line.pem:
            former, self._line = self._line, _Line(pem, self._connect)
            self._former.add(former)
            former.retire(self._close)
        return self._line

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return _MultiCallable(self, lambda channel: channel.unary_unary(*args, **kwargs))

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return _MultiCallable(self, lambda channel: channel.unary_stream(*args, **kwargs))

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return _MultiCallable(self, lambda channel: channel.stream_unary(*args, **kwargs))

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return _MultiCallable(self, lambda channel: channel.stream_stream(*args, **kwargs))

    async def close(self, grace: float | None = None) -> None:
        lines = [self._line, *self._former]
        await asyncio.gather(*(line.channel.close(grace) for line in lines), *self._closing)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._line.channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._line.channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self.line().channel.channel_ready()

    async def __aenter__(self) -> RenewedChannel:
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self.close()

    def _close(self, line: _Line) -> None:
        self._former.discard(line)
        closing = asyncio.ensure_future(line.channel.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)


class _Line:
    """One connection and the calls on it."""

    def __init__(self, pem: Pem, connect: Callable[[Pem], grpc.aio.Channel]) -> None:
        self.pem = pem
        self.channel = connect(pem)
        self._num_calls = 0
        self._when_quiet: Callable[[_Line], None] | None = None

    def began(self, call: Any) -> None:
        self._num_calls += 1
        call.add_done_callback(self._ended)

    def retire(self, when_quiet: Callable[[_Line], None]) -> None:
        """No call begins any more; ``when_quiet`` is called once, when the last has ended."""
        if self._num_calls == 0:
            when_quiet(self)
        else:
            self._when_quiet = when_quiet

    def _ended(self, _: Any) -> None:
        self._num_calls -= 1
        if self._num_calls == 0 and self._when_quiet is not None:
            self._when_quiet(self)


class _MultiCallable:
    def __init__(self, owner: RenewedChannel, make: Callable[[grpc.aio.Channel], Any]) -> None:
        self._owner = owner
        self._make = make
        self._line: _Line | None = None
        self._callable: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        line = self._owner.line()
        if line is not self._line:
            self._line, self._callable = line, self._make(line.channel)
        call = self._callable(*args, **kwargs)
        line.began(call)
        return call
