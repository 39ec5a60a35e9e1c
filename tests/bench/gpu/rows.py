"""What was measured, as lines, JSON and a picture, written again behind each row: who is cut short keeps what there was."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

BAR_TOP, BAR_STEP, BAR_LEFT, BAR_WIDTH, BAR_COLOR, GOAL_COLOR = 40, 22, 640, 400, (72, 120, 168), (200, 40, 40)


@dataclass(frozen=True, slots=True)
class Row:
    """``ratio`` is above 1 where ours is better than the peer, and good from ``goal`` on; a floor's is the share of it that
    is reached.  ``note``: how it was taken."""

    work: str
    ours: float
    peer: float
    ratio: float
    goal: float | None
    unit: str
    note: str = ""

    def __str__(self) -> str:
        goal = "" if self.goal is None else f"  {'met' if self.ratio >= self.goal else 'missed'}: {self.goal:.2f}"
        note = f"  ({self.note})" if self.note else ""
        return f"{self.work:<72}{self.ours:10.3f}{self.peer:10.3f} {self.unit:<5}{self.ratio:7.3f}{goal}{note}"


@dataclass(frozen=True, slots=True)
class NotMeasured:
    work: str
    why: str

    def __str__(self) -> str:
        return f"{self.work}: not measured: {self.why}"


def less_is_better(work: str, ours_s: float, peer_s: float, goal: float | None = None, note: str = "") -> Row:
    return Row(work, ours_s * 1e3, peer_s * 1e3, peer_s / ours_s, goal, "ms", note)


def moved(work: str, nbytes: int, ours_s: float, peer_s: float, goal: float | None = None) -> Row:
    """Two ways of moving as many bytes."""
    return Row(work, nbytes / ours_s / 1e9, nbytes / peer_s / 1e9, peer_s / ours_s, goal, "GB/s")


class Book:
    """``rows.json`` and ``rows.png`` in ``folder``, complete files at any time.  ``machine`` says what measured, by
    what; it has a ``device``."""

    def __init__(self, folder: Path, machine: Mapping[str, object]) -> None:
        self.machine = dict(machine)
        self.rows: list[Row] = []
        self.not_measured: list[NotMeasured] = []
        self._folder = folder
        self._draws = importlib.util.find_spec("PIL") is not None
        folder.mkdir(parents=True, exist_ok=True)
        if not self._draws:
            print("no picture is drawn, as Pillow is not installed")

    def add(self, entry: Row | NotMeasured) -> None:
        print(entry, flush=True)
        if isinstance(entry, Row):
            self.rows.append(entry)
        else:
            self.not_measured.append(entry)
        content = {
            "machine": self.machine,
            "rows": [asdict(row) for row in self.rows],
            "not_measured": [asdict(each) for each in self.not_measured],
        }
        part = self._folder / "rows.json.part"
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self._folder / "rows.json")
        if self._draws:
            part = self._folder / "rows.png.part"
            write_png(part, str(self.machine["device"]), self.rows)
            os.replace(part, self._folder / "rows.png")


def write_png(path: Path, device: str, rows: Sequence[Row]) -> None:
    """A bar for each row, as long as its ratio; a black line is 1, and what is to be reached is red."""
    from PIL import Image, ImageDraw, ImageFont  # late, as where it is missing all else can be measured

    image = Image.new("RGB", (1180, BAR_TOP + BAR_STEP * max(1, len(rows))), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    draw.text((10, 10), f"{device}: times as good as the peer, or share of the floor", "black", font)
    for number, row in enumerate(rows):
        y = BAR_TOP + BAR_STEP * number
        draw.rectangle((BAR_LEFT, y, BAR_LEFT + round(BAR_WIDTH * min(1.2, row.ratio)), y + 15), BAR_COLOR)
        if row.goal is not None:
            x = BAR_LEFT + round(BAR_WIDTH * row.goal)
            draw.line((x, y - 2, x, y + 17), GOAL_COLOR, 2)
        draw.text((10, y), row.work, "black", font)
        draw.text((1130, y), f"{row.ratio:.2f}", "black", font)
    draw.line((BAR_LEFT + BAR_WIDTH, BAR_TOP, BAR_LEFT + BAR_WIDTH, image.height), "black")
    image.save(path, "PNG")
