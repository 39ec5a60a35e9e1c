from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

import transport
from tests.transport.peer import InProcessPeer, Peer, ProcessPeer
from transport import Transport


@pytest.fixture(params=["loopback", "ucx", "ucx-process"])
def backend(request: pytest.FixtureRequest) -> str:
    """Which transport, and whether the peer is a process of its own."""
    return str(request.param)


@pytest.fixture
def ours(backend: str) -> Iterator[Transport]:
    with transport.create(backend.removesuffix("-process")) as t:
        yield t


@pytest.fixture
def new_peer(backend: str) -> Iterator[Callable[[], Peer]]:
    with ExitStack() as stack:

        def create() -> Peer:
            peer = ProcessPeer("ucx") if backend == "ucx-process" else InProcessPeer(backend)
            stack.callback(peer.close)
            return peer

        yield create


@pytest.fixture
def peer(new_peer: Callable[[], Peer]) -> Peer:
    return new_peer()
