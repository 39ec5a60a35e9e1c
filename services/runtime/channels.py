"""One connection per address, however many callers."""

from __future__ import annotations

import asyncio
from types import TracebackType

import grpc

from kvferry._roles import CertificateRole as Role
from services.runtime.channel import open_channel
from services.runtime.tls import Certificates


class Channels:
    """Opens a channel to an address once and hands it out again.  Closes them all on leaving the context.  With
    ``certificates`` all are to services of the role ``peer``.  Owned by one event loop."""

    def __init__(
        self, certificates: Certificates | None = None, *, peer: Role = Role.WORKER, window_nbytes: int | None = None
    ) -> None:
        """``window_nbytes``: as ``open_channel`` has it."""
        self._certificates = certificates
        self._peer = peer
        self._window_nbytes = window_nbytes
        self._channels: dict[str, grpc.aio.Channel] = {}

    def get(self, address: str) -> grpc.aio.Channel:
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = open_channel(
                address, certificates=self._certificates, peer=self._peer, window_nbytes=self._window_nbytes
            )
        return channel

    async def __aenter__(self) -> Channels:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        channels, self._channels = self._channels, {}
        await asyncio.gather(*(channel.close() for channel in channels.values()))
