"""Which faults strike whom, and when.  Pure: a seed and the members give the same list always."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    KILL = "SIGKILL"
    PAUSE = "SIGSTOP, SIGCONT within the lease"
    LONG_PAUSE = "SIGSTOP, SIGCONT after the lease"
    TERMINATE = "SIGTERM"
    DRAIN = "kvferry drain, SIGTERM"
    PARTITION = "packets lost between two members"
    ROLL = "rolling restart of every member"


LEASE_S = 6.0
# A killed process costs the machine its start; a rolling restart costs seven of them.
_WEIGHTS = {
    Kind.KILL: 6,
    Kind.PAUSE: 4,
    Kind.LONG_PAUSE: 2,
    Kind.TERMINATE: 3,
    Kind.DRAIN: 2,
    Kind.PARTITION: 4,
    Kind.ROLL: 1,
}
_GAP_S = (1.0, 6.0)
# The first of each kind comes early, so that a short run has them too; a rolling restart after these.
_FIRST = (Kind.KILL, Kind.PAUSE, Kind.TERMINATE, Kind.DRAIN, Kind.LONG_PAUSE, Kind.PARTITION, Kind.ROLL)


@dataclass(frozen=True, slots=True)
class Fault:
    """``gap_s`` after the one before was brought about, which for pauses and partitions is their begin and for DRAIN and
    ROLL their end.  ``member`` is empty for ROLL, and what ``gently`` says is for it alone: whether workers are
    drained by name first.  ``pause_s`` is for pauses and partitions; these are between ``member`` and ``other``, and
    when ``one_way`` what ``other`` sends arrives."""

    gap_s: float
    kind: Kind
    member: str = ""
    pause_s: float = 0.0
    gently: bool = False
    other: str = ""
    one_way: bool = False

    def __str__(self) -> str:
        pause = f" {self.pause_s:.1f} s" if self.pause_s else ""
        between = f"{' to ' if self.one_way else ' and '}{self.other}" if self.other else ""
        return f"{self.kind.value} {self.member}{between}".strip() + pause


def faults(
    seed: int, workers: Sequence[str], others: Sequence[str], among: Collection[Kind] = tuple(Kind)
) -> Iterator[Fault]:
    """Endless, of the kinds in ``among``.  ``others`` have no blocks, and are struck one time in four; only ``workers`` can
    be drained by name."""
    random_ = random.Random(f"faults {seed}")
    kinds = [kind for kind in _WEIGHTS if kind in among]
    weights = [_WEIGHTS[kind] for kind in kinds]
    first = [kind for kind in _FIRST if kind in among]
    while True:
        kind = first.pop(0) if first else random_.choices(kinds, weights)[0]
        gap_s = random_.uniform(*_GAP_S)
        is_worker = kind is Kind.DRAIN or random_.random() < 0.75
        member = random_.choice(workers if is_worker else others)
        match kind:
            case Kind.PAUSE:
                yield Fault(gap_s, kind, member, pause_s=random_.uniform(0.3, LEASE_S / 2))
            case Kind.LONG_PAUSE:
                yield Fault(gap_s, kind, member, pause_s=random_.uniform(1.2, 1.7) * LEASE_S)
            case Kind.PARTITION:
                member, other = random_.sample([*workers, *others], 2)
                pause_s = random_.uniform(0.5, 2.5) * LEASE_S
                yield Fault(gap_s, kind, member, pause_s, other=other, one_way=random_.random() < 0.5)
            case Kind.ROLL:
                yield Fault(gap_s, kind, gently=random_.random() < 0.5)
            case _:
                yield Fault(gap_s, kind, member)
