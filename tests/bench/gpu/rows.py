"""What was measured, as lines, JSON and a picture.  Pure but for the files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

BAR_TOP, BAR_STEP, BAR_LEFT, BAR_WIDTH, BAR_COLOR = 40, 22, 640, 400, (72, 120, 168)


@dataclass(frozen=True, slots=True)
class Row:
    """``share``: of the floor's rate, 1 is the floor itself."""

    name: str
    measured_s: float
    floor_s: float

    @property
    def share(self) -> float:
        return self.floor_s / self.measured_s

    def __str__(self) -> str:
        return f"{self.name:<72}{self.measured_s * 1e3:10.3f} ms{self.floor_s * 1e3:10.3f} ms floor{self.share:8.2f}"


def write_json(path: Path, device: str, rows: Sequence[Row]) -> None:
    content = {"device": device, "rows": [{**asdict(row), "share": row.share} for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_png(path: Path, device: str, rows: Sequence[Row]) -> None:
    """A bar for each row, as long as its share; a line is the floor."""
    from PIL import Image, ImageDraw, ImageFont  # late, as where it is missing all else can be measured

    image = Image.new("RGB", (1180, BAR_TOP + BAR_STEP * len(rows)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=14)
    draw.text((10, 10), f"{device}: share of the floor", "black", font)
    for number, row in enumerate(rows):
        y = BAR_TOP + BAR_STEP * number
        draw.rectangle((BAR_LEFT, y, BAR_LEFT + round(BAR_WIDTH * min(1.2, row.share)), y + 15), BAR_COLOR)
        draw.text((10, y), row.name, "black", font)
        draw.text((1130, y), f"{row.share:.2f}", "black", font)
    draw.line((BAR_LEFT + BAR_WIDTH, BAR_TOP, BAR_LEFT + BAR_WIDTH, image.height), "black")
    image.save(path)
