"""Whether what a process holds grows.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import median

# The first quarter fills caches and pools; then a quarter against the last one.
PART = 4


class Held(Enum):
    """What is sampled, and by how much it may differ between two quarters of an hour, of itself or in all."""

    MEMORY = ("memory", "MiB", 0.03, 6.0)
    DESCRIPTORS = ("descriptors", "", 0.0, 6.0)
    THREADS = ("threads", "", 0.0, 2.0)

    def __init__(self, label: str, unit: str, share: float, least: float) -> None:
        self.label = label
        self.unit = unit
        self.share = share
        self.least = least


@dataclass(frozen=True, slots=True)
class Trend:
    """Medians: after the warm-up, and at the end."""

    member: str
    held: Held
    early: float
    late: float

    @property
    def growth(self) -> float:
        return self.late - self.early

    @property
    def grows(self) -> bool:
        return self.growth > max(self.held.share * self.early, self.held.least)


def trend(member: str, held: Held, samples: Sequence[float]) -> Trend:
    """Of samples taken at equal times.  Raises ValueError when they are too few to tell."""
    size = len(samples) // PART
    if not size:
        raise ValueError(f"{len(samples)} samples tell no trend; at least {PART} are needed")
    return Trend(member, held, median(samples[size : 2 * size]), median(samples[-size:]))
