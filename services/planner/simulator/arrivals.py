"""What is asked of a cluster, and what became of it.  Pure values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


def nothing(ended_s: float, answer: list[int]) -> Arrival | None:
    return None


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request; its answer has exactly ``num_output`` tokens."""

    id: str
    at_s: float
    prompt: tuple[int, ...]
    num_output: int
    then: Callable[[float, list[int]], Arrival | None] = nothing


@dataclass(slots=True)
class Served:
    """``num_cached``: of the prompt, on whoever computed it.  ``token_at_s``: when each token came."""

    id: str
    arrived_s: float
    num_prompt: int
    num_output: int
    num_cached: int = 0
    first_s: float = 0.0
    ended_s: float = 0.0
    num_retries: int = 0
    token_at_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.arrived_s

    @property
    def itl_s(self) -> float:
        """Mean between two tokens; 0 for an answer of one."""
        return (self.ended_s - self.first_s) / max(1, self.num_output - 1)
