"""What was measured, as lines, JSON and a picture.  Pure but for the files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


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


def write_svg(path: Path, device: str, rows: Sequence[Row]) -> None:
    """A bar for each row, as long as its share; no library is needed to draw that."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="1180" height="{40 + 22 * len(rows)}" font-family="monospace" '
        f'font-size="13"><text x="10" y="20">{device}: share of the floor</text>'
    ]
    for number, row in enumerate(rows):
        y = 40 + 22 * number
        lines.append(f'<rect x="640" y="{y}" width="{400 * min(1.2, row.share):.1f}" height="16" fill="#4878a8"/>')
        lines.append(f'<text x="10" y="{y + 13}">{row.name}</text><text x="1130" y="{y + 13}">{row.share:.2f}</text>')
    path.write_text("\n".join([*lines, "</svg>\n"]), encoding="utf-8")
