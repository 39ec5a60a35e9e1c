"""The cheapest fleet of each kind that keeps the objectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf

from services.planner.designs import (
    PREFILL_STEP_TOKENS,
    Design,
    Kind,
    Size,
    colocated_designs,
    paid_for,
    usd_per_hour,
)
from services.planner.hardware import Worker
from services.planner.sizing import MOST_WORKERS, Sizing

# How often one side of a split may grow before its pair is given up.
_MOST_GROWTHS = 16
_MUCH = 8
# Of one kind that are looked at once there is a fleet, from the one on that would be the cheapest if neither role hindered
# the other.
_MOST_PAIRS = 40
# Share of the requests that a growth must win.
_HELPS = 1e-4


@dataclass(frozen=True, slots=True)
class Found:
    design: Design
    size: Size
    usd_per_hour: float


def cheapest(
    sizing: Sizing, among: Sequence[Worker], patience: float, share: float,
    doing: Callable[[str], None] = lambda what: None,
) -> Mapping[Kind, Found | None]:  # fmt: skip
    """``share`` of the requests keep the objectives; None where none was found, with ``MOST_WORKERS`` of each role at
    most.  ``patience``: of the gateway's line.  ``doing`` is told what is tried."""
    found: dict[Kind, Found | None] = {
        Kind.COLOCATED: _colocated(sizing, colocated_designs(among, patience), share, doing)
    }
    alone = _Alone(sizing, among, patience, share, doing)
    for kind in (Kind.SPLIT_EQUAL, Kind.SPLIT_UNEQUAL):
        found[kind] = _split(sizing, alone, kind, share, doing)
    return found


def size_again(sizing: Sizing, found: Found, share: float) -> Found | None:
    """The same design, as large as ``sizing``'s traffic needs it."""
    design = found.design
    if design.prefill is None:
        count = sizing.colocated(design, share, MOST_WORKERS)
        return None if count is None else _found(design, Size(0, paid_for(design, count)))
    prefill = sizing.prefill_alone(design.prefill, design.step_tokens, design.patience, share)
    decode = sizing.decode_alone(design.decode, share)
    if prefill is None or decode is None:
        return None
    return _grown(sizing, design, sizing.for_links(design, Size(prefill, decode)), share, inf)


def _found(design: Design, size: Size) -> Found:
    return Found(design, size, usd_per_hour(design, size))


def _colocated(
    sizing: Sizing, designs: Sequence[Design], share: float, doing: Callable[[str], None]
) -> Found | None:  # fmt: skip
    best: Found | None = None
    for design in designs:
        doing(f"colocated: {design.decode}, chunks of {design.mixed_tokens}, patience {design.patience:g}")
        # As many as cost no more than the best so far; at the same price the one with which more requests keep them.
        most = (
            MOST_WORKERS
            if best is None
            else min(MOST_WORKERS, int(best.usd_per_hour / design.decode.usd_per_hour + 1e-9))
        )
        if not most or (best is not None and sizing.attained(design, Size(0, most)).all < share):
            continue
        count = sizing.colocated(design, share, most)
        if count is None:
            continue
        found = _found(design, Size(0, paid_for(design, count)))
        if best is None or _rank(sizing, found) < _rank(sizing, best):
            best = found
    return best


def _rank(sizing: Sizing, found: Found) -> tuple[float, float]:
    return round(found.usd_per_hour, 6), -sizing.attained(found.design, found.size).all


class _Alone:
    """What each worker needs in each role, if the other were no hindrance: where a search for pairs begins."""

    def __init__(
        self, sizing: Sizing, among: Sequence[Worker], patience: float, share: float, doing: Callable[[str], None]
    ) -> None:  # fmt: skip
        self.patience = patience
        self.prefill: list[tuple[Worker, int, int]] = []
        self.decode: list[tuple[Worker, int]] = []
        for worker in among:
            for step_tokens in PREFILL_STEP_TOKENS:
                doing(f"prefill: {worker}, chunks of {step_tokens}, patience {patience:g}")
                if (count := sizing.prefill_alone(worker, step_tokens, patience, share)) is not None:
                    self.prefill.append((worker, step_tokens, count))
            doing(f"decode: {worker}")
            if (count := sizing.decode_alone(worker, share)) is not None:
                self.decode.append((worker, count))


def _split(
    sizing: Sizing, alone: _Alone, kind: Kind, share: float, doing: Callable[[str], None]
) -> Found | None:  # fmt: skip
    pairs = [
        _found(design, sizing.for_links(design, Size(num_prefill, num_decode)))
        for prefill, step_tokens, num_prefill in alone.prefill
        for decode, num_decode in alone.decode
        if (design := Design.split(prefill, decode, step_tokens, alone.patience)).kind is kind
    ]
    best: Found | None = None
    for number, pair in enumerate(sorted(pairs, key=lambda found: found.usd_per_hour)):
        most = inf if best is None else best.usd_per_hour
        if pair.usd_per_hour >= most or (best is not None and number >= _MOST_PAIRS):
            break
        doing(f"split: {pair.design.prefill} > {pair.design.decode}, patience {alone.patience:g}")
        best = _grown(sizing, pair.design, pair.size, share, most) or best
    return best


def _grown(sizing: Sizing, design: Design, size: Size, share: float, below_usd: float) -> Found | None:
    """From ``size`` on, the side that keeps fewer of its objectives grows, by a fifth at least.  None where
    ``_MUCH`` times both would not do, as where a last chunk takes too long to be written."""
    if sizing.attained(design, size).all < share:
        most = Size(_MUCH * size.num_prefill, _MUCH * size.num_decode)
        if sizing.attained(design, most).all < share:
            return None
    before = 0.0
    for _ in range(_MOST_GROWTHS):
        found = _found(design, size)
        if max(size.num_prefill, size.num_decode) > MOST_WORKERS:
            return None
        reached = sizing.attained(design, size)
        if reached.all >= share:
            trimmed = _trimmed(sizing, found, share)
            return trimmed if trimmed.usd_per_hour < below_usd else None
        if found.usd_per_hour >= below_usd:
            return None
        if reached.all <= before + _HELPS:
            return None
        before = reached.all
        if reached.first < reached.rest:
            size = Size(size.num_prefill + max(1, size.num_prefill // 5), size.num_decode)
        else:
            size = Size(size.num_prefill, size.num_decode + max(1, size.num_decode // 5))
    return None


def _trimmed(sizing: Sizing, found: Found, share: float) -> Found:
    """Without workers that it can do without: the dearer role first.  Of whole instances it keeps what is paid for
    anyway."""
    design, size = found.design, found.size
    assert design.prefill is not None
    kept = found
    by_price = sorted(((design.prefill.usd_per_hour, 1, 0), (design.decode.usd_per_hour, 0, 1)), reverse=True)
    for _, fewer_prefill, fewer_decode in by_price:
        while True:
            smaller = Size(size.num_prefill - fewer_prefill, size.num_decode - fewer_decode)
            if min(smaller.num_prefill, smaller.num_decode) < 1 or sizing.attained(design, smaller).all < share:
                break
            size = smaller
            if (now := _found(design, size)).usd_per_hour < kept.usd_per_hour:
                kept = now
    return kept
