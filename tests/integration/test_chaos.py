"""A short run of make chaos, by the same seed always: whoever is killed, paused or drained, no answer is wrong or lost."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.run import Settings, run
from tests.chaos.schedule import Kind

# What needs no more than seconds.
QUICK = frozenset({Kind.KILL, Kind.PAUSE, Kind.TERMINATE, Kind.DRAIN})


def test_chaos_loses_nothing(tmp_path: Path) -> None:
    report = run(Settings(seed=104, seconds=9.0, log_dir=tmp_path, num_cases=6, num_streams=3, kinds=QUICK), print)
    assert report.is_good, [*report.broken, *(judged.why for judged in report.judged if judged.why)]
    assert sum(report.faults.values()) >= 3
    assert any(judged.outcome.completed for judged in report.judged)
