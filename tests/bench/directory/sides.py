"""The two that are measured, each as its users meet it: events as they come from the wire, chains as lists of hashes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from gateway.view import ClusterView
from kvferry.api.common.v1 import common_pb2
from kvferry.api.directory.v1 import directory_pb2

PEER = "dynamo"
INSTALL = ".venv/bin/pip install -c constraints.txt --no-deps ai-dynamo-runtime"


class Side(Protocol):
    """Workers are numbered.  A chain is what ``chain`` makes of its hashes, 16 bytes each."""

    name: str

    def chain(self, hashes: Sequence[bytes]) -> Any: ...

    def stored(self, worker: int, hashes: Sequence[bytes]) -> Any:
        """A message; ``apply`` takes it."""
        ...

    def removed(self, worker: int, hashes: Sequence[bytes]) -> Any: ...

    def apply(self, message: Any) -> None: ...

    def find(self, chain: Any) -> Any: ...

    def lengths(self, found: Any) -> dict[int, int]:
        """By worker, of what ``find`` returned."""
        ...


class Kvferry:
    """The gateway's view: a message of the directory's watch is parsed and applied."""

    name = "kvferry"

    def __init__(self, num_workers: int, max_entries: int) -> None:
        self.view = ClusterView(max_index_entries=max_entries)
        for worker in range(num_workers):
            info = directory_pb2.WorkerInfo(worker_id=str(worker), incarnation=1, role=common_pb2.WORKER_ROLE_DECODE)
            joined = directory_pb2.Event(joined=directory_pb2.WorkerState(info=info))
            self.view.apply(directory_pb2.WatchResponse(events=[joined]))

    def chain(self, hashes: Sequence[bytes]) -> list[bytes]:
        return list(hashes)

    def stored(self, worker: int, hashes: Sequence[bytes]) -> bytes:
        return self._message(worker, directory_pb2.BlockEvent(stored=b"".join(hashes)))

    def removed(self, worker: int, hashes: Sequence[bytes]) -> bytes:
        return self._message(worker, directory_pb2.BlockEvent(removed=b"".join(hashes)))

    def apply(self, message: bytes) -> None:
        self.view.apply(directory_pb2.WatchResponse.FromString(message))

    def find(self, chain: list[bytes]) -> Any:
        return self.view.longest_prefix(chain)

    def lengths(self, found: Any) -> dict[int, int]:
        return {int(worker): prefix.num_blocks for worker, prefix in found.items()}

    @staticmethod
    def _message(worker: int, event: directory_pb2.BlockEvent) -> bytes:
        blocks = directory_pb2.BlocksChanged(worker_id=str(worker), incarnation=1, events=[event])
        return directory_pb2.WatchResponse(events=[directory_pb2.Event(blocks=blocks)]).SerializeToString()


class Dynamo:
    """RadixTree of ai-dynamo-runtime, by its Python binding: JSON comes in, and a thread of its own has the tree.  A block
    is known by 8 bytes there."""

    name = PEER

    def __init__(self) -> None:
        from dynamo._core import RadixTree

        self._tree = RadixTree()
        self._num_events = 0

    @staticmethod
    def why_missing() -> str:
        """What its import says; empty when it is installed."""
        try:
            from dynamo._core import RadixTree  # noqa: F401
        except ImportError as error:
            return str(error)
        return ""

    def chain(self, hashes: Sequence[bytes]) -> list[int]:
        return [int.from_bytes(hash_[:8], "little") for hash_ in hashes]

    def stored(self, worker: int, hashes: Sequence[bytes]) -> tuple[int, bytes]:
        blocks = [{"block_hash": number, "tokens_hash": number} for number in self.chain(hashes)]
        return self._message(worker, {"stored": {"parent_hash": None, "blocks": blocks}})

    def removed(self, worker: int, hashes: Sequence[bytes]) -> tuple[int, bytes]:
        return self._message(worker, {"removed": {"block_hashes": self.chain(hashes)}})

    def apply(self, message: tuple[int, bytes]) -> None:
        self._tree.apply_event(*message)

    def find(self, chain: list[int]) -> Any:
        return self._tree.find_matches(chain).scores

    def lengths(self, found: Any) -> dict[int, int]:
        return {worker: length for (worker, _), length in found.items()}

    def _message(self, worker: int, data: Any) -> tuple[int, bytes]:
        self._num_events += 1
        return worker, json.dumps({"event_id": self._num_events, "data": data}).encode()
