"""The rows as a table for people and as JSON for whoever compares runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from tests.bench.transport.rows import Row


def table(rows: Sequence[Row]) -> Table:
    drawn = Table(box=None)
    drawn.add_column("ours vs a peer")  # the one that folds where a terminal is narrow
    for name in ("ours", "peer", "", "ratio", "goal", "met"):
        drawn.add_column(name, justify="right", no_wrap=True, min_width=4)
    for row in rows:
        met = "[green]yes" if row.is_met else "[red]no"
        unit = row.unit.partition(",")[0]
        drawn.add_row(row.work, f"{row.ours:.3g}", f"{row.peer:.3g}", unit, f"{row.ratio:.2f}", f"{row.goal:g}", met)
    return drawn


def write_json(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
