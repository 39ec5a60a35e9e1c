"""What the directory can be told at its start."""

from __future__ import annotations

from dataclasses import dataclass

from services.directory.index import DEFAULT_MAX_ENTRIES
from services.runtime.config import option
from services.runtime.logs import LogLevel


@dataclass(frozen=True, slots=True)
class DirectoryConfig:
    """The cache directory: who is alive, and who holds which KV blocks."""

    listen: str = option("127.0.0.1:8472", help="host:port of the gRPC server")
    metrics_port: int = option(
        0, help="port of the Prometheus metrics on the same host; 0 is off", minimum=0, maximum=65535
    )
    history_events: int = option(
        100_000, help="how many changes are remembered for watchers that resume; others get a snapshot", minimum=1
    )
    max_index_entries: int = option(
        DEFAULT_MAX_ENTRIES,
        help="how many pairs of KV block and worker are known at most, at about 60 bytes each; more are left out",
        minimum=1,
    )
    log_level: LogLevel = option(LogLevel.INFO, help="least severe lines to log")
