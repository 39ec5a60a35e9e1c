"""A published figure beside a simulated one."""

from __future__ import annotations

from dataclasses import asdict, dataclass

NEAR = 0.25


@dataclass(frozen=True, slots=True)
class Published:
    """``low`` and ``high`` differ where the paper gives a range over several models.  ``source``: paper, section or file,
    and whether the figure stands in the text."""

    name: str
    source: str
    low: float
    high: float
    unit: str


@dataclass(frozen=True, slots=True)
class Point:
    """``profiled``: simulated with the step times that the paper's authors measured; ``roofline``: with those of
    `kvferry plan`'s catalogue."""

    published: Published
    profiled: float | None
    roofline: float
    note: str = ""

    def ratio(self, simulated: float | None) -> float | None:
        """To the published figure, or to the nearer end of the range; 1 within it."""
        if simulated is None:
            return None
        if simulated < self.published.low:
            return simulated / self.published.low
        return max(1.0, simulated / self.published.high)

    def as_row(self) -> dict[str, object]:
        ratios = {f"{k}_ratio": self.ratio(v) for k, v in (("profiled", self.profiled), ("roofline", self.roofline))}
        near = {k.replace("ratio", "near"): None if v is None else is_near(v) for k, v in ratios.items()}
        return {**asdict(self.published), "profiled": self.profiled, "roofline": self.roofline, "note": self.note,
                **ratios, **near}  # fmt: skip


def is_near(ratio: float) -> bool:
    return 1 - NEAR <= ratio <= 1 + NEAR
