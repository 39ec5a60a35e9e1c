"""One run: a cluster under steady load for a long time, its answers, and what its processes hold meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.accounts import Accounts, shared_memory, still_running
from tests.chaos.cluster import cluster_of, our_bugs, undisturbed
from tests.chaos.oracle import LATE_S, History, Judged, Verdict, hangs, judge
from tests.chaos.requests import TIMEOUT_S, Case, Load, Outcome, cases
from tests.soak.samples import Samples
from tests.soak.trend import PART, Trend

FRESH = 0.5
# The directory's history of changes would grow for hours: it is full within minutes.
ENVIRONMENT = {"KVFERRY_HISTORY_EVENTS": "1000"}
NUM_SAMPLES = 120
_STARTS_WITHIN_S = 60.0


@dataclass(frozen=True, slots=True)
class Settings:
    seed: int
    seconds: float
    log_dir: Path
    num_cases: int = 24
    num_streams: int = 3


@dataclass(slots=True)
class Report:
    """``broken``: what was left over, grew, or did not add up."""

    samples: Samples = field(default_factory=Samples)
    trends: list[Trend] = field(default_factory=list)
    judged: list[Judged] = field(default_factory=list)
    num_tokens: int = 0
    broken: list[str] = field(default_factory=list)

    def of(self, verdict: Verdict) -> list[Judged]:
        return [judged for judged in self.judged if judged.verdict is verdict]

    @property
    def is_good(self) -> bool:
        fine = len(self.of(Verdict.COMPLETED)) + len(self.of(Verdict.LEFT))
        return fine == len(self.judged) and fine > 0 and not self.broken


def run(settings: Settings, say: Callable[[str], None]) -> Report:
    """Raises ClusterError when the cluster does not start."""
    report = Report()
    shared_before = shared_memory()
    with ExitStack() as stack:
        cluster = stack.enter_context(cluster_of(settings.log_dir, environment=ENVIRONMENT))
        accounts = Accounts(cluster)
        pids = accounts.pids()
        _await_all(accounts)
        asked = cases(settings.seed, settings.num_cases)
        expected = undisturbed(cluster.grpc_address, asked)
        say(f"{len(asked)} answers while nothing else is asked")
        load = Load(settings.seed, cluster.grpc_address, asked, settings.num_streams, fresh=FRESH)
        load.start()
        try:
            _watch(settings.seconds, pids, load, report, say)
        finally:
            hanging = load.stop(TIMEOUT_S + LATE_S)
        report.broken += accounts.await_quiet()
        report.broken += [f"{name} was started again" for name, pid in accounts.pids().items() if pid != pids[name]]
        report.judged = [_judge(outcome, expected) for outcome in load.outcomes]
        report.judged += [hangs(asking, time.monotonic()) for asking in hanging]
        report.num_tokens = sum(len(outcome.token_ids) for outcome in load.outcomes)
    report.broken += still_running(pids.values())
    if left := shared_memory() - shared_before:
        report.broken.append(f"shared memory is left: {sorted(left)}")
    report.broken += our_bugs(settings.log_dir)
    if all(len(series) >= PART for series in report.samples.series.values()):
        report.trends = report.samples.trends()
    report.broken += [
        f"{t.member}: {t.held.label} grew from {t.early:.1f} to {t.late:.1f} {t.held.unit}".rstrip()
        for t in report.trends
        if t.grows
    ]
    return report


def _watch(seconds: float, pids: dict[str, int], load: Load, report: Report, say: Callable[[str], None]) -> None:
    began_s = time.monotonic()
    for number in range(1, NUM_SAMPLES + 1):
        time.sleep(max(0.0, began_s + number * seconds / NUM_SAMPLES - time.monotonic()))
        try:
            report.samples.take(pids)
        except OSError as error:
            report.broken.append(f"a member has ended: {error}")
            return
        if number % (NUM_SAMPLES // 30) == 0:
            memory = {name: series[-1] for (name, held), series in report.samples.series.items() if held.unit == "MiB"}
            held = "  ".join(f"{name} {size:.0f}" for name, size in memory.items())
            say(f"{number * 100 // NUM_SAMPLES:3} %  {len(load.outcomes)} answers; MiB: {held}")


def _judge(outcome: Outcome, expected: dict[Case, tuple[int, ...]]) -> Judged:
    """What nobody asked before is held against nothing; nobody may be refused."""
    if outcome.case not in expected:
        expected = {outcome.case: outcome.token_ids}
    return judge(outcome, expected, History())


def _await_all(accounts: Accounts) -> None:
    end_s = time.monotonic() + _STARTS_WITHIN_S
    while not accounts.all_there() and time.monotonic() < end_s:
        time.sleep(0.2)
