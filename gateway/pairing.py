"""Which prefill workers can write into which decode workers' pools.  Pure.

The same rule in every gateway, and for workers of any age: what a worker did not register is taken to be what all workers
were before it could be.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from gateway.apart import Pair
from gateway.candidates import Abilities, Candidate


def can_pair(prefill: Candidate, decode: Candidate) -> bool:
    """KV of equal content, a protocol that both speak, and a path from the one's pool to the other's."""
    a, b = prefill.abilities, decode.abilities
    return (
        prefill.content_fingerprint == decode.content_fingerprint
        and a.protocol.overlaps(b.protocol)
        and (a.paths is None or b.paths is None or not a.paths.isdisjoint(b.paths))
    )


def why_not_pair(prefill: Candidate, decode: Candidate) -> str:
    """In words, of the prefill worker; empty where they can be paired."""
    if can_pair(prefill, decode):
        return ""
    name, a, b = decode.key.worker_id, prefill.abilities, decode.abilities
    if prefill.content_fingerprint != decode.content_fingerprint:
        return f"its KV does not fit {name}"
    if not a.protocol.overlaps(b.protocol):
        return f"it speaks protocol {a.protocol}, {name} {b.protocol}"
    return f"no path leads from it to {name}: it has {_told(a)}, the other {_told(b)}"


class Partners:
    """The prefill workers of one view, in the order given.  Workers that are alike are compared once: most are.  ``apart``:
    pairs that cannot reach each other for now."""

    def __init__(self, workers: Sequence[Candidate], apart: Set[Pair] = frozenset()) -> None:
        self._workers = workers
        self._apart = apart
        self._first: dict[tuple[str, Abilities], Candidate] = {}  # of each kind
        self._known: dict[tuple[str, Abilities], Sequence[Candidate]] = {}
        for worker in workers:
            self._first.setdefault(_kind(worker), worker)

    def of(self, decode: Candidate) -> Sequence[Candidate]:
        """All that can write into its pool."""
        found = self._alike(decode)
        return [w for w in found if (w.key, decode.key) not in self._apart] if self._apart else found

    def _alike(self, decode: Candidate) -> Sequence[Candidate]:
        kind = _kind(decode)
        found = self._known.get(kind)
        if found is None:
            able = {k for k, first in self._first.items() if can_pair(first, decode)}
            all_are = len(able) == len(self._first)
            found = self._known[kind] = self._workers if all_are else [w for w in self._workers if _kind(w) in able]
        return found


def _kind(worker: Candidate) -> tuple[str, Abilities]:
    return worker.content_fingerprint, worker.abilities


def _told(abilities: Abilities) -> str:
    return " and ".join(sorted(str(path) for path in abilities.paths or ())) or "none"
