"""What a local cluster consists of: one command line for each process."""

from __future__ import annotations

import enum
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import kvferry
from kvferry._roles import CertificateRole
from kvferry.cli import ports
from kvferry.cli.service_tls import CertificateFolder
from kvferry.types import TlsConfig

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_GRPC_PORT = 8470
DEFAULT_HTTP_PORT = 8471
_TLS_VARIABLES = ("KVFERRY_TLS_CERT", "KVFERRY_TLS_KEY", "KVFERRY_TLS_CA")


class Role(enum.Enum):
    DIRECTORY = "directory"
    PREFILL = "prefill"
    DECODE = "decode"
    GATEWAY = "gateway"
    PLANNER = "planner"


class ClusterError(Exception):
    """The cluster cannot run; says why and what to do.  ``log_tail`` holds the last words of the process at fault."""

    def __init__(self, message: str, log_tail: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.log_tail = log_tail


@dataclass(frozen=True, slots=True)
class Member:
    """One process of the cluster.  With ``health_address``, host:port of a standard gRPC health service, it counts as
    ready when that says SERVING; without, as soon as it runs."""

    name: str
    role: Role
    command: tuple[str, ...]
    health_address: str | None = None
    metrics_url: str | None = None
    cwd: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    tls: TlsConfig | None = None  # what its health service is asked with

    @property
    def certificate_role(self) -> CertificateRole:
        match self.role:
            case Role.PREFILL | Role.DECODE:
                return CertificateRole.WORKER
            case Role.PLANNER:
                return CertificateRole.OPERATOR
            case _:
                return CertificateRole(self.role.value)


@dataclass(frozen=True, slots=True)
class Autoscale:
    """The online planner beside the cluster: workers of both roles together, and what is in time for clients."""

    min_workers: int
    max_workers: int
    ttft_s: float
    itl_s: float


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """What to start.  Ports 0 are picked free; ``devices`` are given out to workers in turn, prefill workers first;
    ``prefill_tp`` is the ranks of each prefill worker;
    ``gateway_processes`` those of each gateway that share its ports; ``threads`` per rank,
    None shares the machine's cores out; ``pin`` gives each worker's threads cores of their own, None only where one is left
    over; ``tls`` is a folder of ``kvferry certs init``, and ``insecure`` allows a ``host`` beyond the loopback without; a
    role's dtype is ``dtype`` where it is None; ``log_dir`` is where a planner asks for workers, None the clone's own; what
    else is None is left to the services' own defaults.  Only gateways listen on ``host``, all else on the loopback; those
    after the first on ports that are picked free."""

    model: str = DEFAULT_MODEL
    dtype: str | None = None
    devices: tuple[str, ...] = ()
    prefill_dtype: str | None = None
    decode_dtype: str | None = None
    prefill_block_size: int | None = None
    decode_block_size: int | None = None
    prefill_tp: int = 1
    decode_tp: int = 1
    num_prefill: int = 1
    num_decode: int = 1
    num_gateways: int = 1
    gateway_processes: int = 1
    host: str = ports.LOOPBACK
    grpc_port: int = DEFAULT_GRPC_PORT
    http_port: int = DEFAULT_HTTP_PORT
    threads: int | None = None
    pin: bool | None = None
    kv_memory: str | None = None
    host_kv_memory: str | None = None
    speculate: str | None = None
    api_keys: Path | None = None
    tls: Path | None = None
    insecure: bool = False
    log_level: str = "info"
    autoscale: Autoscale | None = None
    log_dir: Path | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Members in the order in which they start; the addresses are for clients on this machine, ``grpc_address`` all
    gateways', as a client takes them.  ``make_worker``: one more of a role, by its number, on ports that are free by then
    and with as many threads as the others, which are pinned to no cores."""

    members: tuple[Member, ...]
    grpc_address: str
    http_url: str
    make_worker: Callable[[Role, int], Member] | None = None


def clone_root(
    what: str = "a cluster",
    command: str = "make serve",
    packages: Sequence[str] = ("services", "gateway", "transport"),
) -> Path:
    """The clone, or the image, that this package was imported from; ClusterError when it does not hold ``packages``, which
    says what needs them, and how to have it there."""
    root = Path(kvferry.__file__).resolve().parent.parent
    if not all((root / package / "__init__.py").is_file() for package in packages):
        raise ClusterError(
            f"this installation of kvferry has the client alone, and {what} needs the services too: "
            f"clone the repository and run `{command}` there"
        )
    return root


def plan(config: ClusterConfig, root: Path) -> Plan:
    """Decides ports and command lines; starts nothing.  Raises PortError when a port that clients see is taken, and
    ClusterError for a host or a folder of certificates that will not do."""
    _check_safe(config)
    for port, flag in ((config.grpc_port, "--grpc-port"), (config.http_port, "--http-port")):
        if port:
            ports.check_free(config.host, port, flag)
    num_workers = config.num_prefill + config.num_decode
    if config.autoscale is not None and not (
        config.autoscale.min_workers <= num_workers <= config.autoscale.max_workers and config.num_prefill
    ):
        raise ClusterError(
            f"--autoscale begins with a prefill worker at least and {config.autoscale.min_workers} to "
            f"{config.autoscale.max_workers} workers in all, not {config.num_prefill} + {config.num_decode}; "
            "see --prefill, --decode, --min-workers and --max-workers"
        )
    free = iter(
        ports.pick_free(3 + 2 * (num_workers + config.num_gateways), avoid=(config.grpc_port, config.http_port))
    )
    # The members run in the clone, the user may be elsewhere.
    model = str(Path(config.model).resolve()) if Path(config.model).exists() else config.model
    grpc_port, http_port = config.grpc_port or next(free), config.http_port or next(free)
    directory = ports.join(ports.LOOPBACK, next(free))
    client_host = ports.reachable(config.host)
    doors = [(grpc_port, http_port), *((next(free), next(free)) for _ in range(1, config.num_gateways))]
    http_urls = [f"{'http' if config.tls is None else 'https'}://{ports.join(client_host, http)}" for _, http in doors]
    certificates = None if config.tls is None else CertificateFolder(config.tls.resolve())

    def member(role: Role, name: str, module: str, health: str, flags: dict[str, str], metrics_url: str) -> Member:
        # What a client's environment says of TLS is not for the services.
        environment = {"PYTHONUNBUFFERED": "1", **dict.fromkeys(_TLS_VARIABLES, "")}
        made = Member(name, role, (), health, metrics_url, cwd=root, environment=environment)
        if certificates is not None:
            flags = {**flags, **certificates.flags(made.certificate_role)}
            made = replace(made, tls=certificates.operator())
        return replace(made, command=(sys.executable, "-m", module, *(part for flag in flags.items() for part in flag)))

    def metrics(port: int) -> str:
        return f"http://{ports.join(ports.LOOPBACK, port)}/metrics"

    metrics_port = next(free)
    directory_flags = {"--listen": directory, "--metrics-port": str(metrics_port), "--log-level": config.log_level}
    members = [
        member(Role.DIRECTORY, "directory", "services.directory", directory, directory_flags, metrics(metrics_port))
    ]
    cores = sorted(os.sched_getaffinity(0))
    ranks = [config.prefill_tp] * config.num_prefill + [config.decode_tp] * config.num_decode
    more = 0 if config.autoscale is None else config.autoscale.max_workers - num_workers
    threads = config.threads or max(1, len(cores) // (sum(ranks) + more * max(config.prefill_tp, config.decode_tp)))
    own_cores = iter(_share_out(cores, [threads * tp for tp in ranks], config.pin))

    def worker(role: Role, index: int, port: int, metrics_port: int, cpus: str) -> Member:
        dtype, block_size, tp = {
            Role.PREFILL: (config.prefill_dtype or config.dtype, config.prefill_block_size, config.prefill_tp),
            Role.DECODE: (config.decode_dtype or config.dtype, config.decode_block_size, config.decode_tp),
        }[role]
        address, name = ports.join(ports.LOOPBACK, port), f"{role.value}-{index}"
        flags = {
            "--listen": address,
            "--directory": directory,
            "--worker-id": name,
            "--model": model,
            "--threads": str(threads),
            "--metrics-port": str(metrics_port),
            "--log-level": config.log_level,
        }
        if cpus:
            flags["--cpus"] = cpus
        if config.devices:
            number = index if role is Role.PREFILL else config.num_prefill + index
            flags["--device"] = config.devices[number % len(config.devices)]
        if dtype is not None:
            flags["--dtype"] = dtype
        if block_size is not None:
            flags["--block-size"] = str(block_size)
        if tp > 1:
            flags["--tp"] = str(tp)
        if config.kv_memory is not None:
            flags["--kv-memory"] = config.kv_memory
        if config.host_kv_memory is not None:
            flags["--host-kv-memory"] = config.host_kv_memory
        if config.speculate is not None:
            flags["--speculate"] = config.speculate
        return member(role, name, f"services.{role.value}", address, flags, metrics(metrics_port))

    def one_more(role: Role, index: int) -> Member:
        port, metrics_port = ports.pick_free(2)
        return worker(role, index, port, metrics_port, "")

    for role, count in ((Role.PREFILL, config.num_prefill), (Role.DECODE, config.num_decode)):
        members += [worker(role, index, next(free), next(free), next(own_cores)) for index in range(count)]
    for index, (grpc_port, http_port) in enumerate(doors):
        gateway_flags = {
            "--listen": ports.join(config.host, grpc_port),
            "--http-listen": ports.join(config.host, http_port),
            "--directory": directory,
            "--model": model,
            "--log-level": config.log_level,
        }
        if config.api_keys is not None:
            gateway_flags["--api-keys"] = str(config.api_keys.resolve())
        if config.gateway_processes > 1:
            gateway_flags["--processes"] = str(config.gateway_processes)
        name = "gateway" if config.num_gateways == 1 else f"gateway-{index}"
        health, metrics_url = ports.join(client_host, grpc_port), f"{http_urls[index]}/metrics"
        gateway = member(Role.GATEWAY, name, "gateway", health, gateway_flags, metrics_url)
        if config.insecure:
            gateway = replace(gateway, environment={**gateway.environment, "KVFERRY_INSECURE": "on"})
        members.append(gateway)
    if (scaled := config.autoscale) is not None:
        metrics_port = next(free)
        planner_flags = {
            "--directory": directory,
            "--gateway-metrics": ",".join(f"{url}/metrics" for url in http_urls),
            "--supervisor": str(config.log_dir or root / "build" / "logs"),
            "--min-workers": str(scaled.min_workers),
            "--max-workers": str(scaled.max_workers),
            "--ttft-s": str(scaled.ttft_s),
            "--itl-s": str(scaled.itl_s),
            "--metrics-port": str(metrics_port),
            "--log-level": config.log_level,
        }
        planner = member(Role.PLANNER, "planner", "services.planner.online", "", planner_flags, metrics(metrics_port))
        members.append(replace(planner, command=(*planner.command, "--apply"), health_address=None))
    grpc_address = ",".join(ports.join(client_host, grpc) for grpc, _ in doors)
    return Plan(tuple(members), grpc_address, http_urls[0], one_more)


def _check_safe(config: ClusterConfig) -> None:
    if config.tls is not None and (missing := CertificateFolder(config.tls).missing()):
        raise ClusterError(f"--tls: there is no {missing[0]}; make a folder with `kvferry certs init`")
    if config.tls is None and not config.insecure and not ports.is_loopback(config.host):
        raise ClusterError(
            f"others than this machine reach {config.host}, and without TLS keys and prompts travel in the clear; give "
            "--tls, or say --insecure"
        )


def _share_out(cores: list[int], threads: list[int], pin: bool | None) -> list[str]:
    """Each worker's --cpus, for as many threads as ``threads`` says.  Where none would be left for what else there is to
    do, nothing is pinned unasked (ADR 10).  Raises ClusterError."""
    wanted = sum(threads)
    if pin and wanted > len(cores):
        raise ClusterError(
            f"--pin needs {wanted} cores for the threads of {len(threads)} workers, and there are {len(cores)}; "
            "lower --threads, or leave --pin out"
        )
    if pin is False or (pin is None and wanted >= len(cores)):
        return [""] * len(threads)
    free = iter(cores)
    return [",".join(str(next(free)) for _ in range(count)) for count in threads]
