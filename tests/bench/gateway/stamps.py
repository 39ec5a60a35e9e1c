"""Times as token ids: the clock of one host, which all of its processes share."""

from __future__ import annotations

# Any of them is text in a vocabulary of 49152 and more, and no special token.
FIRST_ID = 1_000
NUM_IDS = 40_000
UNIT_S = 50e-6


def stamp(now_s: float) -> int:
    """``now_s``: of time.monotonic()."""
    return FIRST_ID + int(now_s / UNIT_S) % NUM_IDS


def age_s(token_id: int, now_s: float) -> float:
    """How long ago, to ``UNIT_S``, an id was made; wrong by a multiple of two seconds for what is older."""
    return ((now_s / UNIT_S - (token_id - FIRST_ID)) % NUM_IDS) * UNIT_S
