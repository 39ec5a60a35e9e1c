"""What a gateway is told at start."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path

from gateway.admission import PATIENCE, Objectives
from gateway.costs import STALL_WEIGHT
from gateway.routing import Policy
from services.directory.index import DEFAULT_MAX_ENTRIES
from services.runtime.config import option
from services.runtime.logs import LogLevel
from services.runtime.startup import StartupError
from services.runtime.tls import Certificates, TlsOptions


@dataclass(frozen=True, slots=True)
class GatewayConfig(TlsOptions):
    """The front door: gRPC and OpenAI-compatible HTTP, routed over the cluster's workers."""

    listen: str = option("127.0.0.1:8470", help="host:port of the gRPC server")
    http_listen: str = option("127.0.0.1:8471", help="host:port of the HTTP server (OpenAI API, /health, /metrics)")
    directory: tuple[str, ...] = option(
        ("127.0.0.1:8472",), help="host:port of the cache directory, or of several that share a store"
    )
    model: str = option(
        "smollm2-135m-instruct", help="the workers' model: a .gguf file, a Hugging Face directory or id, or a name"
    )
    processes: int = option(
        1,
        help="processes that share the ports and the quotas; each has its own line and --max-requests, and is started "
        "again when it ends",
        minimum=1,
        maximum=256,
    )
    max_requests: int = option(256, help="requests in flight in each process; more are refused", minimum=1)
    max_attempts: int = option(
        3,
        help="how often a request may be started on workers before its first token; what has begun goes on",
        minimum=1,
    )
    retry_ratio: float = option(
        0.2,
        help="retries that bring nothing, at most, for each request; each gateway has three a second more",
        minimum=0,
    )
    min_ship_tokens: int = option(
        32,
        help="prompts of which a decode worker lacks fewer tokens are computed there; kv-aware reckons instead",
        minimum=0,
    )
    stall_weight: float = option(
        STALL_WEIGHT,
        help="what a second that a decode worker's requests lose counts, in seconds of waiting for a first token: the "
        "more, the fewer prompts are computed there while prefill workers are busy (kv-aware, where there are such)",
        minimum=1.0,
        maximum=1000.0,
    )
    routing: Policy = option(
        Policy.KV_AWARE, help="how workers are chosen: by cost, or by a simpler rule to compare that with"
    )
    max_queue_s: float = option(
        0.25,
        help="seconds of prompt work that may wait on a worker; more waits in the gateway, where tenants take turns",
        minimum=0.0,
    )
    patience: float = option(
        PATIENCE,
        help="in the line a request lets its tenant's shorter prompts go first until it has waited so many times what its "
        "own takes, less where --slo-ttft-s leaves less; 0: in order of arrival",
        minimum=0.0,
    )
    slo_ttft_s: float = option(
        0.0,
        help="refuse requests whose first token is expected later than this, in seconds, because others are served first; "
        "0: none",
        minimum=0.0,
    )
    slo_itl_s: float = option(
        0.0,
        help="let no more requests into a decode worker than leave its steps this short, in seconds, and pass a first "
        "token on when its answer goes on, not when the prompt is computed; 0: as many as fit, and at once",
        minimum=0.0,
    )
    stall_timeout_s: float = option(120.0, help="a worker silent for so long has failed", minimum=0.1)
    max_request_s: float = option(600.0, help="longest time for one request", minimum=0.1)
    write_timeout_s: float = option(30.0, help="a client that reads nothing for so long loses its stream", minimum=0.1)
    max_body_nbytes: int = option(2 * 1024 * 1024, help="largest HTTP request body", minimum=1024)
    max_index_entries: int = option(
        DEFAULT_MAX_ENTRIES,
        help="how many pairs of KV block and worker are known at most, at about 60 bytes each; more are left out",
        minimum=1,
    )
    public_cert: Path | None = option(
        None,
        help="PEM file of the certificate, and those between it and its authority, that clients are shown instead of "
        "--tls-cert, such as a public authority's; --tls-cert stays for other services",
    )
    public_key: Path | None = option(None, help="PEM file of its private key")
    api_keys: Path | None = option(
        None,
        help="file of API keys and their tenants (`kvferry key` makes it); without, everybody who reaches a port may ask",
    )
    drain_timeout_s: float = option(20.0, help="how long running requests may take to finish after SIGTERM", minimum=0)
    health_port: int = option(
        0,
        help="port of gRPC health on the same host, in the clear for probes that have no certificate; 0 is off",
        minimum=0,
        maximum=65535,
    )
    log_level: LogLevel = option(LogLevel.INFO, help="least severe lines to log")

    def __post_init__(self) -> None:
        if not self.directory:
            raise ValueError("--directory must name at least one address")
        if self.processes > 1 and any(address.endswith(":0") for address in (self.listen, self.http_listen)):
            raise ValueError(
                "--processes: to share ports they must be named; give --listen and --http-listen other than 0"
            )

    @property
    def objectives(self) -> Objectives:
        return Objectives(self.max_queue_s, self.slo_ttft_s or inf, self.slo_itl_s or inf, self.patience)

    def both_certificates(self) -> tuple[Certificates | None, Certificates | None]:
        """For other services, and for the doors that clients come in by.  Raises StartupError as ``certificates`` does."""
        public = {"--public-cert": self.public_cert, "--public-key": self.public_key}
        missing = [flag for flag, path in public.items() if path is None]
        if len(missing) == 1:
            raise StartupError(f"{missing[0]} must be given too: a certificate and its key go together")
        if missing:
            inner = self.certificates(self.listen, self.http_listen)
            return inner, inner
        assert self.public_cert is not None
        assert self.public_key is not None
        try:
            return self.certificates(), Certificates(self.public_cert, self.public_key, None)
        except ValueError as error:
            raise StartupError(str(error)) from error
