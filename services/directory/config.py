"""What the directory can be told at its start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.directory.index import DEFAULT_MAX_ENTRIES
from services.runtime.config import option
from services.runtime.logs import LogLevel
from services.runtime.tls import TlsOptions

MEMORY = "memory"
_SCHEMES = ("redis://", "rediss://", "unix://")


@dataclass(frozen=True, slots=True)
class DirectoryConfig(TlsOptions):
    """The cache directory: who is alive, and who holds which KV blocks."""

    listen: str = option("127.0.0.1:8472", help="host:port of the gRPC server")
    metrics_port: int = option(
        0, help="port of the Prometheus metrics on the same host; 0 is off", minimum=0, maximum=65535
    )
    health_port: int = option(
        0,
        help="port of gRPC health on the same host, in the clear for probes that have no certificate; 0 is off",
        minimum=0,
        maximum=65535,
    )
    store: str = option(
        MEMORY,
        help="memory, or the URL of a Valkey or Redis that several directories share: redis://[user@]host:port[/db], "
        "rediss:// with TLS, unix://path; ps shows a password written here, so give it by the environment or a file",
    )
    store_password_file: Path | None = option(None, help="file whose first line is the store's password")
    history_events: int = option(
        100_000, help="how many changes are remembered for watchers that resume; others get a snapshot", minimum=1
    )
    max_index_entries: int = option(
        DEFAULT_MAX_ENTRIES,
        help="how many pairs of KV block and worker are known at most, at about 60 bytes each; more are left out",
        minimum=1,
    )
    log_level: LogLevel = option(LogLevel.INFO, help="least severe lines to log")

    def __post_init__(self) -> None:
        # What was given is not repeated: it may hold a password.
        if self.store != MEMORY and not self.store.startswith(_SCHEMES):
            raise ValueError(f"--store must be {MEMORY} or begin with one of {', '.join(_SCHEMES)}")
        if self.store == MEMORY and self.store_password_file is not None:
            raise ValueError("--store-password-file is for a --store that is a URL")
