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


@pytest.fixture(scope="session")
def idle_processes() -> Iterator[list[ProcessPeer]]:
    idle: list[ProcessPeer] = []
    yield idle
    for peer in idle:
        peer.close()


@pytest.fixture
def new_peer(backend: str, idle_processes: list[ProcessPeer]) -> Iterator[Callable[[], Peer]]:
    """Peers with an allocation of their own; a process is used again by later tests unless it was harmed."""
    with ExitStack() as stack:

        def let_go(peer: Peer) -> None:
            if isinstance(peer, ProcessPeer) and peer.reusable:
                idle_processes.append(peer)
            else:
                peer.close()

        def create() -> Peer:
            peer: Peer
            if backend == "ucx-process":
                peer = idle_processes.pop() if idle_processes else ProcessPeer("ucx")
            else:
                peer = InProcessPeer(backend)
            stack.callback(let_go, peer)
            return peer

        yield create


@pytest.fixture
def peer(new_peer: Callable[[], Peer]) -> Peer:
    return new_peer()
