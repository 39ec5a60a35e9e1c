"""Channels between services."""

from __future__ import annotations

from typing import Any

import grpc

from kvferry._roles import CertificateRole as Role
from services.runtime.renewed_channel import RenewedChannel
from services.runtime.server import MAX_MESSAGE_NBYTES
from services.runtime.tls import Certificates
from services.runtime.tracing import outgoing_metadata

_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_NBYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_NBYTES),
    # A peer whose host is gone is noticed within 8 s, and a service that restarts is found again within 2 s.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Peers are addressed directly; a proxy configured for the outside world must not come between.
    ("grpc.enable_http_proxy", 0),
    # Channels to one address do not share a connection, so closing one or its backoff cannot be felt by another.
    ("grpc.use_local_subchannel_pool", 1),
)


def open_channel(
    address: str,
    *,
    certificates: Certificates | None = None,
    peer: Role | None = None,
    window_nbytes: int | None = None,
) -> grpc.aio.Channel:
    """A channel to ``address`` (host:port), in the clear without ``certificates``; with them, to none but who shows the
    certificate of a ``peer``, wherever it runs.  Connects when first used, reconnects for ever with a backoff from 100 ms
    to 2 s.  Every call made through it sends the caller's request id and trace context.  ``window_nbytes``: what a stream
    may bring beyond the message that is being read, always, instead of as much as the connection carries.  The caller
    closes it.  Must be called within the event loop that uses it."""
    options = _OPTIONS
    if window_nbytes is not None:
        options += (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", window_nbytes))
    if certificates is None:
        return _Channel(grpc.aio.insecure_channel(address, options=options))
    assert peer is not None, "what the peer's certificate must say"
    options += (("grpc.ssl_target_name_override", peer.dns_name),)
    return _Channel(
        RenewedChannel(certificates, lambda pem: grpc.aio.secure_channel(address, pem.channel_credentials, options))
    )


class _Channel(grpc.aio.Channel):
    """Adds ``outgoing_metadata()`` to every call.  A wrapper and not a client interceptor, because those turn each call
    into a proxy with a task of its own."""

    def __init__(self, inner: grpc.aio.Channel) -> None:
        self._inner = inner

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return _MultiCallable(self._inner.unary_unary(*args, **kwargs))

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return _MultiCallable(self._inner.unary_stream(*args, **kwargs))

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return _MultiCallable(self._inner.stream_unary(*args, **kwargs))

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return _MultiCallable(self._inner.stream_stream(*args, **kwargs))

    async def close(self, grace: float | None = None) -> None:
        await self._inner.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._inner.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._inner.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._inner.channel_ready()

    async def __aenter__(self) -> _Channel:
        await self._inner.__aenter__()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self._inner.__aexit__(*exc)


class _MultiCallable:
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __call__(self, *args: Any, metadata: Any = None, **kwargs: Any) -> Any:
        given = tuple(metadata or ())
        keys = {key for key, _ in given}
        added = tuple((key, value) for key, value in outgoing_metadata() if key not in keys)
        return self._inner(*args, metadata=(*given, *added), **kwargs)
