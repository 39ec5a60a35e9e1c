"""What a target is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from hypothesis import strategies as st

Mutate = Callable[[bytes, Random], bytes | None]


@dataclass(frozen=True, slots=True)
class Target:
    """``read`` takes an input (True) or refuses it by an error that names it (False); anything else that it raises is a
    finding.  ``inputs`` are well-formed or nearly so: hypothesis tries them in the suite, `make fuzz` begins with them.
    ``mutate`` changes an input so that it keeps its outer form, or returns None where it has none.  ``native``: compiled
    code of ours reads, which `make fuzz` builds with sanitizers."""

    name: str
    inputs: st.SearchStrategy[bytes]
    read: Callable[[bytes], bool]
    mutate: Mutate | None = None
    native: bool = False
    max_nbytes: int = 1 << 14
