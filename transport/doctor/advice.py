"""What the facts mean, and what to do about them.  Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from transport.base import Path
from transport.doctor.facts import Facts, Host, Rate, Trial, Ucx
from transport.ucp import OLDEST_UCX_FOR_GPUS, SETTINGS, carries_gpus, may_map

HUGE_PAGES_SINCE = (6, 1)
FEW_OPEN_FILES = 1024
LITTLE_MEMORY = 1 << 30  # a worker's default pool, and as much again for its model
SLOW = 0.5  # of memcpy

# Why they are not used is told in transport/ucp.py.
_BY_PROCESS_NUMBER = frozenset({"cma", "xpmem", "knem"})
_NOT_USED = _BY_PROCESS_NUMBER | {"sysv", "self", "posix"}
_RDMA = re.compile(r"(rc|ud|dc|gga)_|srd$")


class Level(Enum):
    OK = "ok"
    NOTE = "note"  # nothing is wrong with it, but it decides something
    WARNING = "warning"  # works, but slower or frailer than it could
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Finding:
    """``text`` says what is; ``change``, where something is to be done, is a sentence that says what."""

    section: str
    level: Level
    text: str
    change: str = ""


def judge(facts: Facts) -> tuple[Finding, ...]:
    """In the order in which to show them, those of a section together."""
    return (
        *_ucx(facts),
        *_variables(facts.host),
        *_neighbours(facts),
        *_other_hosts(facts.host, facts.ucx),
        *_cuda(facts),
        *_memory(facts),
        *_limits(facts.host),
        *_speed(facts.trials),
    )


def _ucx(facts: Facts) -> Iterator[Finding]:
    ucx = facts.ucx
    if ucx is None:
        yield Finding("UCX", Level.BROKEN, "no UCX was found", f"Give kvferry a UCX: {_clause(facts.no_ucx)}.")
        return
    source = "the libucx wheel" if ucx.from_wheel else f"{ucx.home} (KVFERRY_UCX_HOME)"
    first = facts.trials[0]
    if first.ucx_version:
        yield Finding("UCX", Level.OK, f"UCX {first.ucx_version} from {source}")
    else:
        yield Finding(
            "UCX", Level.BROKEN, f"UCX from {source} does not start", f"Make UCX start: {_clause(first.failure)}."
        )
    if ucx.offers is None:
        change = f"Install the ucx_info of this UCX (apt-get install ucx-utils) as {ucx.home}/bin/ucx_info."
        yield Finding("UCX", Level.WARNING, f"what it offers here cannot be told: {ucx.no_offers}", change)
        return
    devices: dict[str, list[str]] = {}
    for offer in ucx.offers:
        if offer.transport not in _NOT_USED:
            devices.setdefault(offer.transport, []).append(offer.device)
    offers = "; ".join(f"{name} on {', '.join(on)}" for name, on in devices.items())
    yield Finding("UCX", Level.OK, f"it offers {offers or 'nothing but shared memory'}")


def _variables(host: Host) -> Iterator[Finding]:
    others = dict(host.variables)
    if (tls := others.pop("UCX_TLS", None)) is not None:
        if not may_map(tls):
            text = f"UCX_TLS={tls} forbids shared memory: pools of this host are not mapped"
            yield Finding("UCX", Level.WARNING, text, "Unset UCX_TLS, or add posix to it.")
        elif lets_in_process_numbers(tls):
            text = f"UCX_TLS={tls} allows transports whose survivors abort when a peer dies"
            yield Finding("UCX", Level.WARNING, text, f"Unset UCX_TLS, or write UCX_TLS={SETTINGS['UCX_TLS']}.")
        else:
            yield Finding("UCX", Level.NOTE, f"UCX_TLS={tls} is set by you")
    if (threshold := others.pop("UCX_RNDV_THRESH", "inf")) != "inf":
        text = f"UCX_RNDV_THRESH={threshold} makes writes over tcp slow, and a writer's death can abort the owner"
        yield Finding("UCX", Level.WARNING, text, "Unset UCX_RNDV_THRESH.")
    if others:
        yield Finding("UCX", Level.NOTE, f"set by you: {' '.join(f'{name}={others[name]}' for name in others)}")


def lets_in_process_numbers(ucx_tls: str) -> bool:
    """Whether UCX may reach into another process's memory by its number."""
    names = set(ucx_tls.lstrip("^").split(","))
    if ucx_tls.startswith("^"):
        return not names >= _BY_PROCESS_NUMBER and not names & {"shm", "sm"}
    return bool(names & (_BY_PROCESS_NUMBER | {"shm", "sm", "all"}))


def _neighbours(facts: Facts) -> Iterator[Finding]:
    section, host = "Neighbours on this host", facts.host
    trial = facts.trials[0] if facts.trials else None
    if trial is not None and trial.ucx_version:
        if trial.path is Path.MAPPED:
            yield Finding(section, Level.OK, "a second process's pool was mapped: writes are plain stores")
        elif trial.path is None:
            change = f"Let two processes of this host exchange blocks: {_clause(trial.failure)}."
            yield Finding(section, Level.BROKEN, "two processes could not exchange blocks", change)
        elif trial.expected is Path.MAPPED:
            yield Finding(section, Level.BROKEN, f"pools should be mapped but are not: {trial.why_not_mapped}",
                          _to_map(trial.why_not_mapped))  # fmt: skip
        else:
            yield Finding(section, Level.NOTE, "pools are not mapped, as UCX_TLS asks")
    whom = f"workers map each other as the same user (this is user {host.user}) in the same PID namespace"
    if host.own_pid_namespace and host.num_other_containers:
        whom += f"; {host.num_other_containers} other container(s) of this user are in this one"
    if host.hidepid:
        whom += f"; hidepid={host.hidepid} hides those of other users"
    yield Finding(section, Level.NOTE, whom)
    if host.own_pid_namespace and not host.num_other_containers:
        yield Finding(
            section,
            Level.WARNING,
            "this container sees no process of another one: KV between it and workers in other containers goes over tcp",
            "To map pools across containers of one host, give these one PID namespace: docker run --pid=container:NAME, in "
            "compose pid: service:NAME, in Kubernetes shareProcessNamespace (one pod) or hostPID.",
        )


def _to_map(why_not: str) -> str:
    if "watched" in why_not:
        return "Allow pidfd_open (Linux 5.3 or newer; a container's seccomp profile may forbid it)."
    return (
        "Allow processes of one user to open each other's /proc/PID/fd: give both the same capabilities, and look for a "
        "security module that forbids it."
    )


def _other_hosts(host: Host, ucx: Ucx | None) -> Iterator[Finding]:
    section = "Other hosts"
    offers = () if ucx is None else ucx.offers or ()
    if not host.rdma_ports:
        yield Finding(section, Level.NOTE, "no RDMA device: pools of other hosts are reached over tcp")
    elif ucx is not None:
        yield _rdma(section, host, ucx)
    if ucx is not None and ucx.offers is not None:
        devices = [offer.device for offer in offers if offer.transport == "tcp"]
        if set(devices) - {"lo"}:
            yield Finding(section, Level.OK, f"tcp by {', '.join(device for device in devices if device != 'lo')}")
        else:
            yield Finding(section, Level.NOTE, "no tcp device but the loopback: over tcp nobody else is reached")


def _rdma(section: str, host: Host, ucx: Ucx) -> Finding:
    named = ", ".join(f"{port.device}:{port.port}" for port in host.rdma_ports)
    active = [port for port in host.rdma_ports if port.state == "ACTIVE"]
    rdma = [offer for offer in ucx.offers or () if _RDMA.match(offer.transport)]
    if not any(module.startswith("ib") for module in ucx.modules):
        change = "Install a UCX with verbs (apt-get install libucx-dev ucx-utils) and set KVFERRY_UCX_HOME=/usr."
        return Finding(section, Level.WARNING, f"RDMA ({named}) is not used: this UCX was built without verbs", change)
    if not active:
        change = "Bring an RDMA port up; `rdma link` shows them."
        return Finding(section, Level.WARNING, f"RDMA ({named}) is not used: no port is active", change)
    if not host.rdma_permitted:
        text = f"RDMA ({named}) is not used: /dev/infiniband/uverbs* cannot be opened"
        change = "Give the process /dev/infiniband (docker run --device=/dev/infiniband) and the right to open it."
        return Finding(section, Level.WARNING, text, change)
    if ucx.offers is not None and not rdma:
        change = "Ask UCX why: UCX_LOG_LEVEL=info ucx_info -d."
        return Finding(section, Level.WARNING, f"RDMA ({named}) is not used: UCX offers none of it", change)
    if host.locked_limit_nbytes is not None:
        text = f"RDMA ({named}) needs pools locked in memory, and {_size(host.locked_limit_nbytes)} may be"
        change = "Raise the limit of locked memory (ulimit -l unlimited, docker run --ulimit memlock=-1)."
        return Finding(section, Level.WARNING, text, change)
    rates = ", ".join(f"{port.device}:{port.port} at {port.rate}" for port in active)
    return Finding(section, Level.OK, f"RDMA by {rates}")


def _cuda(facts: Facts) -> Iterator[Finding]:
    host, ucx = facts.host, facts.ucx
    if not host.cuda_devices:
        yield Finding("CUDA", Level.NOTE, "no CUDA device: pools lie in host memory")
        return
    if ucx is None:
        return
    text = f"{len(host.cuda_devices)} CUDA device(s)"
    if "cuda" not in ucx.modules:
        change = "Install a UCX with CUDA: pip install libucx-cu13, or point KVFERRY_UCX_HOME at one."
        yield Finding("CUDA", Level.WARNING, f"{text}, but this UCX was built without CUDA", change)
        return
    version = facts.trials[0].ucx_version
    if version and not carries_gpus(tuple(map(int, version.split(".")))):
        oldest = ".".join(map(str, OLDEST_UCX_FOR_GPUS))
        change = f"Install UCX {oldest} or newer: pip install -U libucx-cu13, or point KVFERRY_UCX_HOME at one."
        yield Finding("CUDA", Level.WARNING, f"{text}, but UCX {version} would move their KV over TCP", change)
        return
    if ucx.offers is None:
        yield Finding("CUDA", Level.NOTE, text)
        return
    transports = {offer.transport for offer in ucx.offers}
    if "cuda_copy" not in transports:
        change = "Make the driver's libcuda.so.1 loadable (in a container: docker run --gpus all)."
        yield Finding("CUDA", Level.WARNING, f"{text}, but UCX cannot use them", change)
        return
    near = "cuda_ipc" if "cuda_ipc" in transports else "copies through host memory"
    by_rdma = any(_RDMA.match(offer.transport) and "cuda" in offer.memory for offer in ucx.offers)
    far = "RDMA straight from the device" if by_rdma else "copies through host memory"
    yield Finding("CUDA", Level.OK, f"{text}; CUDA memory would go by {near} on this host, by {far} to other hosts")


def _memory(facts: Facts) -> Iterator[Finding]:
    section, host = "Memory", facts.host
    text = f"{_size(host.available_nbytes)} can be had"
    if host.group_limit_nbytes is not None:
        text += f", of {_size(host.group_limit_nbytes)} that the control group allows"
    if host.available_nbytes < LITTLE_MEMORY:
        change = (
            "Free memory or raise the control group's limit: a worker needs its --kv-memory and its model's weights."
        )
        yield Finding(section, Level.WARNING, text, change)
    else:
        yield Finding(section, Level.OK, text)
    if facts.trials and facts.trials[0].ucx_version:
        if facts.trials[0].huge_pages:
            yield Finding(section, Level.OK, "pools get pages of 2 MiB")
        else:
            text = "pools get pages of 4 KiB: copies between scattered blocks are slower"
            yield Finding(section, Level.WARNING, text, _to_get_huge_pages(host))


def _to_get_huge_pages(host: Host) -> str:
    if host.shmem_huge_pages == "deny":
        return "Write never, instead of deny, to /sys/kernel/mm/transparent_hugepage/shmem_enabled."
    version = re.match(r"(\d+)\.(\d+)", host.kernel)
    if version and (int(version[1]), int(version[2])) < HUGE_PAGES_SINCE:
        return f"Boot Linux {'.'.join(map(str, HUGE_PAGES_SINCE))} or newer, this is {host.kernel}."
    if not host.shmem_huge_pages:
        return "Boot a kernel built with CONFIG_TRANSPARENT_HUGEPAGE."
    return "Join free memory into large pieces before workers start: echo 1 > /proc/sys/vm/compact_memory."


def _limits(host: Host) -> Iterator[Finding]:
    locked = "no limit" if host.locked_limit_nbytes is None else _size(host.locked_limit_nbytes)
    yield Finding("Memory", Level.NOTE, f"locked memory: {locked} (matters for RDMA alone)")
    files = "no limit" if host.max_open_files is None else str(host.max_open_files)
    few = host.max_open_files is not None and host.max_open_files < FEW_OPEN_FILES
    change = "Raise the limit of open files (ulimit -n 4096): each peer and each client takes some." if few else ""
    yield Finding("Memory", Level.WARNING if few else Level.OK, f"open files: {files}", change)


def _speed(trials: tuple[Trial, ...]) -> Iterator[Finding]:
    for trial in trials:
        for rate in trial.rates:
            yield _rate(trial, rate)
        if trial.failure and trial.path is not None:
            change = f"Find out why blocks cannot be moved: {_clause(trial.failure)}."
            yield Finding("Speed", Level.BROKEN, f"{trial.label}: measuring failed", change)
        elif trial.failure and trial is not trials[0]:
            change = f"Let two processes of this host exchange blocks over {trial.title}: {_clause(trial.failure)}."
            yield Finding("Speed", Level.BROKEN, f"{trial.label}: two processes could not exchange blocks", change)


def _rate(trial: Trial, rate: Rate) -> Finding:
    what = f"{trial.label} {rate.op}"
    text = f"{what:<12} {rate.gb_per_s:6.2f} GB/s, {rate.of_memcpy:.2f} of memcpy ({rate.memcpy_gb_per_s:.2f} GB/s)"
    if not rate.intact:
        return Finding(
            "Speed", Level.BROKEN, f"{text}, and the data differs", f"Do not use this host: {what}s lose data."
        )
    if trial.path is Path.MAPPED and rate.of_memcpy < SLOW:
        change = f"Run the doctor again while the machine is idle: {what}s should come near memcpy."
        return Finding("Speed", Level.WARNING, text, change)
    return Finding("Speed", Level.OK, text)


def _clause(message: str) -> str:
    """On one line, to stand within a sentence."""
    return " ".join(message.split()).rstrip(".")


def _size(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.1f} GiB" if nbytes >= 1 << 30 else f"{nbytes / (1 << 20):.0f} MiB"
