"""One run: a cluster, references while it is quiet, load and faults, and what is left afterwards."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from kvferry import Client
from kvferry.cli.cluster import LocalCluster, Timing
from kvferry.cli.members import ClusterConfig, ClusterError, Member, Role, clone_root, plan
from tests.chaos.accounts import Accounts, shared_memory, still_running
from tests.chaos.injector import Injector
from tests.chaos.oracle import LATE_S, Judged, Verdict, judge
from tests.chaos.requests import TIMEOUT_S, Case, Load, Outcome, cases
from tests.chaos.schedule import Kind, faults
from tests.namespaces import CannotPartition, Network

# So that prompts of a few hundred tokens take several chunks.
ENVIRONMENT = {"KVFERRY_CHUNK_TOKENS": "128"}


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
        network = _network(settings, stack, say)
        if network is None:
            settings = replace(settings, kinds=settings.kinds - {Kind.PARTITION})
        cluster = stack.enter_context(_cluster(settings.log_dir, network))
        accounts = Accounts(cluster)
        injector = Injector(cluster, accounts.all_there, say, network)
        injector.settle()
        began_s = time.monotonic()
        asked = cases(settings.seed, settings.num_cases)
        expected = _undisturbed(cluster.grpc_address, asked)
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
        report.judged += [_hangs(asking.case, asking.began_s) for asking in hanging]
    report.broken += still_running(injector.pids)
    if left := shared_memory() - shared_before:
        report.broken.append(f"shared memory is left: {sorted(left)}")
    report.broken += _our_bugs(settings.log_dir)
    return report


# Memory for fewer tokens than the clients ask for at once: blocks run out, are evicted, and come back.
_CONFIG = ClusterConfig(
    num_prefill=2, num_decode=2, num_gateways=2, grpc_port=0, http_port=0, threads=1, kv_memory="48MiB",
    host_kv_memory="48MiB",
)  # fmt: skip


def _network(settings: Settings, stack: ExitStack, say: Callable[[str], None]) -> Network | None:
    """With a host for each member, where partitions are wanted and can be made."""
    if Kind.PARTITION not in settings.kinds:
        return None
    try:
        return stack.enter_context(Network([m.name for m in plan(_CONFIG, clone_root()).members]))
    except CannotPartition as why:
        say(f"without partitions: {why}")
        return None


def _cluster(log_dir: Path, network: Network | None) -> LocalCluster:
    planned = plan(_CONFIG, clone_root())
    members = [replace(m, environment={**m.environment, **ENVIRONMENT}) for m in planned.members]
    grpc_address = planned.grpc_address
    if network is not None:
        moved = _addresses(members, network)
        members, grpc_address = _on_hosts(members, moved, network), _move(grpc_address, moved)
    return LocalCluster(
        members, log_dir, grpc_address=grpc_address, http_url=planned.http_url,
        timing=Timing(backoff_s=0.2, max_backoff_s=1.0),
    )  # fmt: skip


def _on_hosts(members: Sequence[Member], moved: Mapping[str, str], network: Network) -> list[Member]:
    """The same, each on the host of its name."""
    return [
        replace(
            m,
            command=network.command(m.name, tuple(_move(part, moved) for part in m.command)),
            health_address=None if m.health_address is None else _move(m.health_address, moved),
            environment={**m.environment, "KVFERRY_INSECURE": "on"},
        )
        for m in members
    ]


def _addresses(members: Sequence[Member], network: Network) -> dict[str, str]:
    """Of all that they listen on, by where they would on the loopback."""
    listened = (
        (member.name, address)
        for member in members
        for flag, address in pairwise(member.command)
        if flag in ("--listen", "--http-listen")
    )
    return {address: f"{network.address(name)}:{address.rpartition(':')[2]}" for name, address in listened}


def _move(addresses: str, moved: Mapping[str, str]) -> str:
    return ",".join(moved.get(address, address) for address in addresses.split(","))


def _undisturbed(address: str, asked: list[Case]) -> dict[Case, tuple[int, ...]]:
    with Client(address) as client, ThreadPoolExecutor(4) as threads:
        outcomes = list(threads.map(lambda case: case.ask(client).run(), asked))
    for outcome in outcomes:
        if not outcome.completed:
            raise ClusterError(f"nothing was disturbed yet, and a request failed: {outcome.error}")
    return {outcome.case: outcome.token_ids for outcome in outcomes}


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


def _hangs(case: Case, began_s: float) -> Judged:
    now_s = time.monotonic()
    outcome = Outcome(case, began_s, now_s, (), "", completed=False)
    return Judged(outcome, Verdict.LOST, f"has not ended {now_s - began_s - TIMEOUT_S:.0f} s after its deadline")


def _our_bugs(log_dir: Path) -> list[str]:
    """Lines of the members' logs that tell of one."""
    found: Counter[str] = Counter()
    for log in sorted(log_dir.glob("*.log")):
        for line in log.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                if line.startswith(("Traceback", "Fatal", "AssertionError")):
                    found[f"{log.stem}: {line}"] += 1
                continue
            if isinstance(record, dict) and (record.get("level") in ("error", "critical") or record.get("exception")):
                last = str(record.get("exception", "")).strip().splitlines()[-1:]
                found[f"{log.stem}: {record.get('event')} {' '.join(last)}"] += 1
    return [f"{line} ({count} times)" for line, count in found.items()]
