"""What the doctor knows of a host before it judges."""

from __future__ import annotations

from dataclasses import dataclass

from transport.base import Op, Path


@dataclass(frozen=True, slots=True)
class Offer:
    """A transport that UCX has for a device of this host, and the kinds of memory its domain reaches."""

    transport: str
    device: str
    memory: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Ucx:
    """An installation.  ``modules`` are what it was built with beyond shared memory and tcp, such as ib and cuda;
    ``offers`` is None, and ``no_offers`` says why, where they could not be asked for."""

    home: str
    from_wheel: bool
    modules: tuple[str, ...]
    offers: tuple[Offer, ...] | None
    no_offers: str = ""


@dataclass(frozen=True, slots=True)
class RdmaPort:
    """As in /sys/class/infiniband; ``state`` such as ACTIVE, ``rate`` such as "100 Gb/sec (4X EDR)", ``link_layer``
    InfiniBand or Ethernet."""

    device: str
    port: int
    state: str
    rate: str
    link_layer: str


@dataclass(frozen=True, slots=True)
class Host:
    """Limits are None where there are none; ``variables`` are the user's own UCX_*, by name; ``num_other_containers``
    have processes of this user in the same PID namespace."""

    kernel: str
    shmem_huge_pages: str
    available_nbytes: int
    group_limit_nbytes: int | None
    locked_limit_nbytes: int | None
    max_open_files: int | None
    user: int
    own_pid_namespace: bool
    num_other_containers: int
    hidepid: str
    variables: dict[str, str]
    rdma_ports: tuple[RdmaPort, ...]
    rdma_permitted: bool
    cuda_devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rate:
    """``of_memcpy`` is the median of the rounds' own ratios, which a machine that changes its speed does not move."""

    op: Op
    gb_per_s: float
    memcpy_gb_per_s: float
    of_memcpy: float
    num_rounds: int
    intact: bool


@dataclass(frozen=True, slots=True)
class Trial:
    """Two processes of this host that reached for each other.  With ``failure`` all that follows it may be missing."""

    title: str
    ucx_tls: str
    expected: Path
    failure: str = ""
    ucx_version: str = ""
    huge_pages: bool = False
    path: Path | None = None
    why_not_mapped: str = ""
    rates: tuple[Rate, ...] = ()

    @property
    def label(self) -> str:
        return "mapped" if self.path is Path.MAPPED else self.title


@dataclass(frozen=True, slots=True)
class Facts:
    """The first trial runs with the settings a worker would have here.  ``ucx`` is None where there is none, and
    ``no_ucx`` says what to do."""

    host: Host
    ucx: Ucx | None
    no_ucx: str
    trials: tuple[Trial, ...]
