"""The command line of a worker process."""

from __future__ import annotations

import sys

from services.runtime import logs, tracing
from services.runtime.config import load
from services.runtime.cpus import leave
from services.runtime.server import run_until_stopped
from services.worker.config import WorkerConfig
from services.worker.node import Role, run_worker


def start(role: Role, other: Role, name: str) -> int:
    prog = f"python -m services.{name}"
    config = load(WorkerConfig, sys.argv[1:], prog)
    logs.configure(config.worker_id or name, level=config.log_level.value)
    tracing.configure(config.worker_id or name)
    # Before any other thread starts: they inherit it, and the ones that compute are sent back by ``run_worker``.
    leave(config.compute_cpus)
    return run_until_stopped(run_worker(config, role, other), prog=prog)
