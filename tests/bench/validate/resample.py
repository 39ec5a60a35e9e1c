"""How well a load says what it says.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from math import inf

import numpy as np

from kvferry.bench.record import Record
from kvferry.bench.slo import Slo
from tests.bench.validate.simulated import Figures, of_records

STRETCH_S, TIMES, SHARE = 10.0, 200, 0.95
FEWEST_STRETCHES = 10


def known_to(records: Sequence[Record], slo: Slo, seed: int = 0) -> Figures:
    """By how much each figure of ``of_records`` could be another if the load were run again, as a share of it: the further
    end of the interval that 95 % lie in when the load's stretches of 10 s are drawn anew, some twice and some not (the
    block bootstrap; Künsch, "The jackknife and the bootstrap for general stationary observations", 1989): whoever queues
    together waits for the same.  0 of a figure that is 0; inf where the load is too short to tell."""
    begin_s = min(record.scheduled_s for record in records)
    stretches: dict[int, list[Record]] = {}
    for record in records:
        stretches.setdefault(int((record.scheduled_s - begin_s) / STRETCH_S), []).append(record)
    if len(stretches) < FEWEST_STRETCHES:
        return Figures(inf, inf, inf, inf, inf)
    all_of, random = list(stretches.values()), np.random.default_rng(seed)
    drawn = [
        astuple(
            of_records([record for at in random.integers(len(all_of), size=len(all_of)) for record in all_of[at]], slo)
        )
        for _ in range(TIMES)
    ]
    ends = np.percentile(np.array(drawn), (50 * (1 - SHARE), 50 * (1 + SHARE)), axis=0)
    found = np.array(astuple(of_records(records, slo)))
    off = np.abs(ends - found).max(axis=0)
    return Figures(*np.divide(off, found, out=np.zeros_like(off), where=found > 0).tolist())
