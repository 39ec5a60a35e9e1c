"""How far a group of workers may go in one step towards the size that is wanted.  Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bounds:
    """``most_up`` and ``most_down``: workers in one step."""

    minimum: int = 1
    maximum: int = 64
    most_up: int = 8
    most_down: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.minimum <= self.maximum:
            raise ValueError(f"{self.minimum} to {self.maximum} is no range of workers")
        if self.most_up < 1 or self.most_down < 1:
            raise ValueError("a step is of one worker at least")


@dataclass(frozen=True, slots=True)
class Size:
    """``wanted``: as was last set.  ``existing``: that run, start or drain."""

    wanted: int
    existing: int


@dataclass(frozen=True, slots=True)
class Step:
    """``count``: to set; the same as before where nothing is to be done.  ``why``: where that is not what was asked for."""

    count: int
    why: str = ""


def next_step(size: Size, target: int, bounds: Bounds) -> Step:
    """Towards ``target``.  Nobody is sent off while others still drain: what they carried is on its way to those who stay,
    whose load says nothing yet.  A group outside of its bounds is brought within them at once."""
    within = min(max(target, bounds.minimum), bounds.maximum)
    why = "" if within == target else f"{target} is outside of {bounds.minimum} to {bounds.maximum}"
    now = min(max(size.wanted, bounds.minimum), bounds.maximum)
    if within > now:
        count = min(within, now + bounds.most_up)
    elif within < now:
        if size.existing > size.wanted:
            return Step(now, f"{size.existing - size.wanted} still drain")
        count = max(within, now - bounds.most_down)
    else:
        return Step(now, why)
    return Step(count, why if count == within else f"{abs(count - now)} in one step")
