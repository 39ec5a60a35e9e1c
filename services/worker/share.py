"""Which share of the transfers is verified.  Pure: the random number comes in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Self


@dataclass(frozen=True, slots=True)
class Share:
    """A probability, from none (0) to all (1)."""

    value: Fraction

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of "all", "none" or "1/16".  Raises ValueError."""
        match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
        if text in ("all", "none"):
            return cls(Fraction(text == "all"))
        if match is None or not 0 < int(match[1]) <= int(match[2]):
            raise ValueError(f"{text!r} is no share of the transfers; write all, none, or a fraction such as 1/16")
        return cls(Fraction(int(match[1]), int(match[2])))

    def takes(self, drawn: float) -> bool:
        """Whether the one for which ``drawn`` was drawn, uniformly from [0, 1), is in the share."""
        return drawn < self.value
