"""Who holds which blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

HASH_NBYTES = 16


def split_hashes(data: bytes) -> list[bytes]:
    """The hashes that ``data`` holds back to back.  Raises ValueError when its length is no multiple of 16."""
    if len(data) % HASH_NBYTES:
        raise ValueError(f"hashes are {HASH_NBYTES} bytes each, but {len(data)} bytes were sent")
    return [data[i : i + HASH_NBYTES] for i in range(0, len(data), HASH_NBYTES)]


class BlockIndex:
    """Chain hash (16 bytes) -> the workers whose prefix cache holds that block.

    A chain hash stands for its block and all before it, but a worker may have evicted earlier blocks of a chain.  Not
    thread-safe.
    """

    def __init__(self) -> None:
        self._holders: dict[bytes, set[str]] = {}
        self._held: dict[str, set[bytes]] = {}

    def stored(self, worker_id: str, hashes: Iterable[bytes]) -> None:
        """Idempotent."""
        held = self._held.setdefault(worker_id, set())
        for block in hashes:
            held.add(block)
            self._holders.setdefault(block, set()).add(worker_id)
        if not held:
            del self._held[worker_id]

    def removed(self, worker_id: str, hashes: Iterable[bytes]) -> None:
        """Idempotent; what the worker does not hold is ignored."""
        held = self._held.get(worker_id)
        if held is None:
            return
        for block in hashes:
            if block in held:
                held.remove(block)
                self._forget(worker_id, block)
        if not held:
            del self._held[worker_id]

    def cleared(self, worker_id: str) -> None:
        """The worker holds nothing (any more), or is gone."""
        for block in self._held.pop(worker_id, ()):
            self._forget(worker_id, block)

    def longest_prefix(self, hashes: Sequence[bytes]) -> dict[str, int]:
        """For each worker that holds the first of ``hashes``, how many leading ones it holds without a gap."""
        lengths: dict[str, int] = {}
        holding: set[str] | None = None
        for length, block in enumerate(hashes, start=1):
            holders = self._holders.get(block, set())
            holding = holders if holding is None else holding & holders
            if not holding:
                break
            for worker_id in holding:
                lengths[worker_id] = length
        return lengths

    def held_by(self, worker_id: str) -> frozenset[bytes]:
        return frozenset(self._held.get(worker_id, ()))

    def num_blocks(self, worker_id: str) -> int:
        return len(self._held.get(worker_id, ()))

    def num_blocks_by_worker(self) -> Mapping[str, int]:
        """Workers that hold nothing are left out."""
        return {worker_id: len(held) for worker_id, held in self._held.items()}

    @property
    def num_distinct_blocks(self) -> int:
        return len(self._holders)

    def check_integrity(self) -> None:
        """Raises AssertionError when the two directions disagree or something empty was kept."""
        assert all(self._held.values()), "a worker without blocks was kept"
        assert all(self._holders.values()), "a block without holders was kept"
        forward = {(worker_id, block) for worker_id, held in self._held.items() for block in held}
        backward = {(worker_id, block) for block, holders in self._holders.items() for worker_id in holders}
        assert forward == backward, f"{len(forward ^ backward)} entries are on one side only"

    def _forget(self, worker_id: str, block: bytes) -> None:
        holders = self._holders[block]
        holders.remove(worker_id)
        if not holders:
            del self._holders[block]
