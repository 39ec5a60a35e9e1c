"""The cluster that faults and load are let loose on: two of each kind of worker, two gateways, a directory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

from kvferry import Client
from kvferry.cli.cluster import LocalCluster, Timing
from kvferry.cli.members import ClusterConfig, ClusterError, Member, clone_root, plan
from tests.chaos.requests import Case
from tests.namespaces import CannotPartition, Network

# So that prompts of a few hundred tokens take several chunks.
ENVIRONMENT = {"KVFERRY_CHUNK_TOKENS": "128"}
# Memory for fewer tokens than the clients ask for at once: blocks run out, are evicted, and come back.
_CONFIG = ClusterConfig(
    num_prefill=2, num_decode=2, num_gateways=2, grpc_port=0, http_port=0, threads=1, kv_memory="48MiB",
    host_kv_memory="48MiB",
)  # fmt: skip
_NOTHING: Mapping[str, str] = MappingProxyType({})


def hosts(stack: ExitStack, say: Callable[[str], None]) -> Network | None:
    """One for each member, where they can be made."""
    try:
        return stack.enter_context(Network([m.name for m in plan(_CONFIG, clone_root()).members]))
    except CannotPartition as why:
        say(f"without partitions: {why}")
        return None


def cluster_of(
    log_dir: Path, network: Network | None = None, environment: Mapping[str, str] = _NOTHING
) -> LocalCluster:
    """To be entered; each member on its host, if there are any, and with more settings if those are given."""
    planned = plan(_CONFIG, clone_root())
    members = [replace(m, environment={**m.environment, **ENVIRONMENT, **environment}) for m in planned.members]
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


def undisturbed(address: str, asked: list[Case]) -> dict[Case, tuple[int, ...]]:
    """The answers, while nothing else is asked.  Raises ClusterError."""
    with Client(address) as client, ThreadPoolExecutor(4) as threads:
        outcomes = list(threads.map(lambda case: case.ask(client).run(), asked))
    for outcome in outcomes:
        if not outcome.completed:
            raise ClusterError(f"nothing was disturbed yet, and a request failed: {outcome.error}")
    return {outcome.case: outcome.token_ids for outcome in outcomes}


def our_bugs(log_dir: Path) -> list[str]:
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
