"""Plots as SVG, that scale with the page and need nothing from elsewhere.  Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 14, 40
# Told apart by those who do not see all colours, too (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")

Points = Sequence[tuple[float, float]]


class Axis:
    """From values to places on ``low`` .. ``high``, which are in pixels."""

    def __init__(
        self, values: Sequence[float], low: float, high: float, *, log: bool, least: float | None = None
    ) -> None:
        finite = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [1.0]
        self.log, self._low, self._high = log, low, high
        self.first = min(finite) if least is None else least
        self.last = max(finite)
        if log:
            self.first, self.last = 10 ** math.floor(math.log10(self.first)), 10 ** math.ceil(math.log10(self.last))
        if self.last <= self.first:
            self.last = self.first * 10 if log else self.first + 1

    def place(self, value: float) -> float:
        if self.log:
            share = math.log(max(value, self.first) / self.first) / math.log(self.last / self.first)
        else:
            share = (value - self.first) / (self.last - self.first)
        return self._low + min(1.0, max(0.0, share)) * (self._high - self._low)

    def ticks(self) -> list[float]:
        if self.log:
            count = round(math.log10(self.last / self.first))
            every = max(1, math.ceil(count / 6))
            return [self.first * 10**power for power in range(0, count + 1, every)]
        span = self.last - self.first
        step = 10 ** math.floor(math.log10(span))
        step = next(step * m for m in (0.2, 0.5, 1.0, 2.0) if span / (step * m) <= 6)
        return [step * n for n in range(math.ceil(self.first / step), math.floor(self.last / step) + 1)]


def lines(
    named: Sequence[tuple[str, Points]], x_label: str, y_label: str, *, log_x: bool = False, log_y: bool = False,
    marks: Sequence[tuple[str, float, float]] = (),
) -> Markup:  # fmt: skip
    """A line for each name; ``marks`` are points with a name beside them."""
    everything = [point for _, points in named for point in points] + [(x, y) for _, x, y in marks]
    x = Axis([p[0] for p in everything], _LEFT, WIDTH - _RIGHT, log=log_x)
    y = Axis([p[1] for p in everything], HEIGHT - _BOTTOM, _TOP, log=log_y, least=None if log_y else 0.0)
    parts = [_frame(x, y, x_label, y_label)]
    for index, (_, points) in enumerate(named):
        path = " ".join(
            f"{x.place(a):.1f},{y.place(b):.1f}" for a, b in points if math.isfinite(a) and math.isfinite(b)
        )
        parts.append(f'<polyline points="{path}" fill="none" stroke="{_colour(index)}" stroke-width="2"/>')
    for index, (name, a, b) in enumerate(marks):
        at_x, at_y = x.place(a), y.place(b)
        ends = at_x > WIDTH * 0.6
        parts.append(
            f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="4" fill="{COLOURS[1]}"/>'
            f'<text x="{at_x + (-7 if ends else 7):.1f}" y="{at_y + 14 + 11 * (index % 2):.1f}" class="mark" '
            f'text-anchor="{"end" if ends else "start"}">{escape(name)}</text>'
        )
    return _svg(parts, [name for name, _ in named])


def bars(named: Sequence[tuple[str, float]], y_label: str, unit: str) -> Markup:
    """From left to right."""
    y = Axis([value for _, value in named], HEIGHT - _BOTTOM, _TOP + 12, log=False, least=0.0)
    width = (WIDTH - _LEFT - _RIGHT) / max(1, len(named))
    parts = [_frame(None, y, "", y_label)]
    for index, (name, value) in enumerate(named):
        top = y.place(value)
        middle = _LEFT + (index + 0.5) * width
        parts.append(
            f'<rect x="{middle - width * 0.35:.1f}" y="{top:.1f}" width="{width * 0.7:.1f}" '
            f'height="{HEIGHT - _BOTTOM - top:.1f}" fill="{_colour(index)}"/>'
            f'<text x="{middle:.1f}" y="{top - 4:.1f}" text-anchor="middle">{escape(f"{unit}{value:.3g}")}</text>'
            f'<text x="{middle:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle" class="mark">{escape(name)}</text>'
        )
    return _svg(parts, [])


def _frame(x: Axis | None, y: Axis, x_label: str, y_label: str) -> str:
    parts = []
    for value in y.ticks():
        at = y.place(value)
        parts.append(
            f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>'
            f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:.4g}</text>'
        )
    for value in x.ticks() if x else ():
        assert x is not None
        at = x.place(value)
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}" class="grid"/>'
            f'<text x="{at:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{value:.4g}</text>'
        )
    parts.append(
        f'<text x="{(_LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text transform="translate(13 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _svg(parts: Sequence[str], names: Sequence[str]) -> Markup:
    legend = "".join(
        f'<span><i style="background:{_colour(index)}"></i>{escape(name)}</span>' for index, name in enumerate(names)
    )
    # What parts hold of others' words was escaped where it was put in.
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg><p class="legend">{legend}</p>'
    )


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]
