"""Whether a request would find a decode worker now.

The view alone cannot tell: while the directory is away it keeps workers, which may have died meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable

import grpc

from gateway.view import ClusterView
from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2
from services.runtime.protocol import SPOKEN

_UP, _DOWN = grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE


class Readiness:
    """Owned by the event loop.  ``channel`` hands out the one to an address, which stays the same."""

    def __init__(self, view: ClusterView, model_revision: str, channel: Callable[[str], grpc.aio.Channel]) -> None:
        self._view = view
        self._model_revision = model_revision
        self._channel = channel
        self._down: set[str] = set()  # addresses that could not be connected to, and have not been since

    def look(self) -> bool:
        """Does not wait: begins to connect to workers until one is there, and a later look knows what came of it.  One that
        has not been tried yet counts as there."""
        workers = self._view.workers.values()
        if len(self._down) > len(workers):
            self._down &= {state.info.control_address for state in workers}
        return any(self._would_serve(state) and self._is_there(state.info.control_address) for state in workers)

    def _would_serve(self, state: directory_pb2.WorkerState) -> bool:
        return (
            state.info.role == common_pb2.WORKER_ROLE_DECODE
            and state.info.model.revision == self._model_revision
            and not state.load.draining
            and self._view.abilities(state.info.worker_id).protocol.overlaps(SPOKEN)
        )

    def _is_there(self, address: str) -> bool:
        state = self._channel(address).get_state(try_to_connect=True)
        if state is _UP:
            self._down.discard(address)
        elif state is _DOWN:
            self._down.add(address)
        return address not in self._down
