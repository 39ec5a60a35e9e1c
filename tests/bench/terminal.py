"""What the benches have in common at a terminal."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from rich.console import Console


def say(console: Console, text: str) -> None:
    """The text as it is, and lines as long as they are."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def require_parts(parser: argparse.ArgumentParser, what: str, parts: Iterable[str], names: Sequence[str]) -> None:
    """Ends the process with what to write, unless each part is in a name.  ``what`` is named."""
    for part in parts:
        if not any(part in name for name in names):
            parser.error(f"no {what}'s name holds {part!r}; there are {', '.join(names)}")
