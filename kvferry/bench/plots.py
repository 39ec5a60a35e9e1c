"""Line plots as inline SVG.  Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 220
LEFT, RIGHT, TOP, BOTTOM = 48, 8, 8, 36
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed")
MAX_POINTS = 400


@dataclass(frozen=True, slots=True)
class Line:
    """At least one point, in order of x."""

    name: str
    points: Sequence[tuple[float, float]]


def plot(lines: Sequence[Line], x_name: str, y_name: str) -> str:
    """From 0 to the largest value on both axes, with a legend; scales to the width that it is given.  Long lines are
    thinned.  Without a line it says so."""
    if not lines:
        return "<p>nothing was measured</p>"
    x_end = _round_up(max(x for line in lines for x, _ in line.points))
    y_end = _round_up(max(y for line in lines for _, y in line.points))

    def place(x: float, y: float) -> str:
        across = LEFT + x / x_end * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - y / y_end * (HEIGHT - TOP - BOTTOM)
        return f"{across:.1f},{down:.1f}"

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_name)} by {escape(x_name)}">']
    for quarter in range(5):
        x, y = x_end * quarter / 4, y_end * quarter / 4
        (x_at, _), (_, y_at) = place(x, 0).split(","), place(0, y).split(",")
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_at}" y2="{y_at}"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{y_at}" dy="3" text-anchor="end">{y:.3g}</text>')
        parts.append(f'<text x="{x_at}" y="{HEIGHT - BOTTOM + 13}" text-anchor="middle">{x:.3g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_name)}</text>')
    for line, colour in zip(lines, COLOURS, strict=False):
        shown = " ".join(place(x, y) for x, y in _thinned(line.points))
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.5" points="{shown}"/>')
    parts.append("</svg>")
    keys = " ".join(
        f'<span style="color:{colour}">■</span> {escape(line.name)}'
        for line, colour in zip(lines, COLOURS, strict=False)
    )
    return f"<figure><figcaption><b>{escape(y_name)}</b> {keys}</figcaption>{''.join(parts)}</figure>"


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    step = max(1, math.ceil(len(points) / MAX_POINTS))
    kept = list(points[::step])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _round_up(value: float) -> float:
    """To 1, 2, 4, 5 or 8 times a power of ten; 1 for what is next to nothing, whose powers are no numbers any more."""
    if value < 1e-300:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 5, 8, 10) if step * power >= value * (1 - 1e-9))
