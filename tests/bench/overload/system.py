"""One prefill and one decode worker behind a gateway that promises latencies and knows two tenants."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from kvferry.bench.slo import Slo
from kvferry.cli.cluster import LocalCluster
from kvferry.cli.members import ClusterConfig, clone_root, plan
from tests.bench.system.systems import ROOT

LOGS = ROOT / "build/logs/bench-overload"
# Keys of a gateway on loopback that lives for minutes.
KEYS = {"flooding": "the flooding tenant's key", "modest": "the modest tenant's key"}
# Full before the overload begins, so that what grows then is not the pool being touched for the first time.
KV_MEMORY = "128MiB"


@dataclass(frozen=True, slots=True)
class System:
    address: str
    pids: dict[str, int]


@contextmanager
def running(objectives: Slo) -> Iterator[System]:
    """The gateway's objectives are the load's.  Raises ClusterError."""
    LOGS.mkdir(parents=True, exist_ok=True)
    keys = LOGS / "keys.toml"
    digests = {tenant: hashlib.sha256(key.encode()).hexdigest() for tenant, key in KEYS.items()}
    keys.write_text("".join(f'[[key]]\ntenant = "{name}"\nsha256 = "{digest}"\n' for name, digest in digests.items()))
    config = ClusterConfig(
        grpc_port=0, http_port=0, threads=1, pin=False, kv_memory=KV_MEMORY, api_keys=keys, log_level="warning"
    )
    planned = plan(config, clone_root())
    promised = {"KVFERRY_SLO_TTFT_S": str(objectives.ttft or 0.0), "KVFERRY_SLO_ITL_S": str(objectives.itl or 0.0)}
    members = [replace(m, environment={**m.environment, **promised}) for m in planned.members]
    cluster = LocalCluster(members, LOGS, restart=False)
    with cluster:
        pids = {member.name: pid for member in members if (pid := cluster.pid(member.name)) is not None}
        yield System(planned.grpc_address, pids)
