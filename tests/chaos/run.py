"""One run: a cluster, references while it is quiet, load and faults, and what is left afterwards."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from kvferry.cli.cluster import LocalCluster
from kvferry.cli.members import ClusterError, Role
from tests.chaos.accounts import Accounts, shared_memory, still_running
from tests.chaos.cluster import cluster_of, hosts, our_bugs, undisturbed
from tests.chaos.injector import Injector
from tests.chaos.oracle import LATE_S, Judged, Verdict, hangs, judge
from tests.chaos.requests import TIMEOUT_S, Load, cases
from tests.chaos.schedule import Kind, faults


@dataclass(frozen=True, slots=True)
class Settings:
    seed: int
    seconds: float
    log_dir: Path
    num_cases: int = 24
    num_streams: int = 8
    kinds: frozenset[Kind] = frozenset(Kind)


@dataclass(slots=True)
class Report:
    """``broken``: what was left over, or did not come back."""

    began_s: float = field(default_factory=time.monotonic)
    faults: Counter[Kind] = field(default_factory=Counter)
    judged: list[Judged] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def of(self, verdict: Verdict) -> list[Judged]:
        return [judged for judged in self.judged if judged.verdict is verdict]

    @property
    def num_recovered(self) -> int:
        return sum(judged.outcome.num_retries > 0 for judged in self.of(Verdict.COMPLETED))

    @property
    def is_good(self) -> bool:
        return not (self.of(Verdict.WRONG) or self.of(Verdict.LOST) or self.broken)


def run(settings: Settings, say: Callable[[str], None]) -> Report:
    """Raises ClusterError when the cluster does not start."""
    report = Report()
    shared_before = shared_memory()
    with ExitStack() as stack:
        network = hosts(stack, say) if Kind.PARTITION in settings.kinds else None
        if network is None:
            settings = replace(settings, kinds=settings.kinds - {Kind.PARTITION})
        cluster = stack.enter_context(cluster_of(settings.log_dir, network))
        accounts = Accounts(cluster)
        injector = Injector(cluster, accounts, say, network)
        injector.settle()
        began_s = time.monotonic()
        asked = cases(settings.seed, settings.num_cases)
        expected = undisturbed(cluster.grpc_address, asked)
        say(f"{len(asked)} answers undisturbed, in {time.monotonic() - began_s:.0f} s")
        report.broken += accounts.await_quiet()
        descriptors = accounts.descriptors()
        load = Load(settings.seed, cluster.grpc_address, asked, settings.num_streams)
        load.start()
        try:
            _disturb(settings, injector, cluster)
            hanging = load.stop(TIMEOUT_S + LATE_S)
            report.broken += accounts.await_quiet()
            report.broken += accounts.leaks(descriptors)
        except ClusterError as error:
            report.broken.append(str(error))
            hanging = load.stop(TIMEOUT_S + LATE_S)
        report.faults = injector.injected
        report.broken += injector.unfenced
        report.judged = [judge(outcome, expected, injector.history) for outcome in load.outcomes]
        report.judged += [hangs(asking, time.monotonic()) for asking in hanging]
    report.broken += still_running(injector.pids)
    if left := shared_memory() - shared_before:
        report.broken.append(f"shared memory is left: {sorted(left)}")
    report.broken += our_bugs(settings.log_dir)
    return report


def _disturb(settings: Settings, injector: Injector, cluster: LocalCluster) -> None:
    workers = [m.name for m in cluster.members if m.role in (Role.PREFILL, Role.DECODE)]
    others = [m.name for m in cluster.members if m.name not in workers]
    end_s = time.monotonic() + settings.seconds
    try:
        for fault in faults(settings.seed, workers, others, settings.kinds):
            left_s = end_s - time.monotonic()
            if fault.gap_s >= left_s:
                time.sleep(max(0.0, left_s))
                break
            time.sleep(fault.gap_s)
            injector.bring_about(fault)
    finally:
        injector.settle()
