"""Phases drawn as bars, one line each, on a common axis of time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from kvferry._phases import Phase, Span
from kvferry.cli import output

WIDTH = 80
NAME_WIDTH = 20
GLYPHS = "#="  # neighbouring spans in turn, so that one sees where a chunk ends
BLOCKS = str.maketrans(GLYPHS, "█▒")
STYLES = {"prefill compute": "cyan", "KV written": "green", "exposed transfer": "red", "decode compute": "magenta"}


def show(title: str, phases: Sequence[Phase], total_s: float) -> None:
    """Rich on a terminal, plain ASCII when piped; 80 columns either way."""
    width = WIDTH - NAME_WIDTH
    lines = [(phase.name, bar(phase.spans, total_s, width)) for phase in phases]
    if not output.is_terminal():
        print(title)
        for name, drawn in lines:
            print(f"{name:{NAME_WIDTH}}{drawn}".rstrip())
        print(axis(total_s, width).rjust(WIDTH))
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(title, "bold"))
    for name, drawn in lines:
        cells = Text(drawn.translate(BLOCKS), STYLES.get(name, "dim"))
        console.print(Text.assemble(f"{name:{NAME_WIDTH}}", cells))
    console.print(Text(axis(total_s, width).rjust(WIDTH), "dim"))


def bar(spans: Sequence[Span], total_s: float, width: int) -> str:
    """``width`` cells for the time from 0 to ``total_s``.  A span fills every cell that it touches, at least one, however
    short it is; a cell that two touch shows the later."""
    cells = [" "] * width
    for number, (begin_s, end_s) in enumerate(spans):
        begin, end = (min(1.0, max(0.0, at_s / total_s)) * width if total_s > 0 else 0.0 for at_s in (begin_s, end_s))
        first = min(int(begin), width - 1)
        length = max(1, math.ceil(end) - first)
        cells[first : first + length] = GLYPHS[number % len(GLYPHS)] * length
    return "".join(cells)


def axis(total_s: float, width: int) -> str:
    """The line below the bars: where they begin and where they end."""
    end = f"{total_s:.2f} s" if total_s >= 1 else f"{total_s * 1e3:.1f} ms"
    return "0" + end.rjust(width - 1, "-")
