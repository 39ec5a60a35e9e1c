"""Rounds with a progress bar."""

from __future__ import annotations

from collections.abc import Iterator

from rich.progress import track

NUM_WARM_UP = 2


def rounds(what: str, num_rounds: int, num_warm_up: int = NUM_WARM_UP) -> Iterator[int]:
    """The rounds' numbers; those of the warm-up are negative and do not count."""
    yield from track(range(-num_warm_up, num_rounds), what, transient=True)
