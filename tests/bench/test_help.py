"""Every bench starts: nothing else in the suite runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "bench",
    [
        "transport",
        "overlap",
        "pull",
        "engine",
        "engine.speculation",
        "system",
        "directory",
        "plan",
        "published",
        "validate",
        "routing",
        "scale",
        "split",
        "autoscale",
        "load",
        "gateway",
        "gpu",
    ],
)
def test_a_bench_says_what_it_measures(bench: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.bench.{bench}", "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--rounds" in done.stdout
