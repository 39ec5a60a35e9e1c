"""What a fleet may be made of: devices, tensor parallelism, chunk sizes.  Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from math import ceil

from services.planner.fleet import Fleet, Gateway, Link, Pool
from services.planner.hardware import Catalogue, Device, Worker, make_worker
from services.planner.models import ModelShape

TPS = (1, 2, 4, 8)
# Of prompts, in steps in which others decode.
COLOCATED_CHUNKS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
# Of prompts alone at least: as many as make any device's step one that compute bounds.
ALONE_STEP_TOKENS = 2048
# What is written overlaps with the next chunk, so smaller ones leave less to write at the end.
PREFILL_STEP_TOKENS = (512, 2048, 8192)


class Kind(Enum):
    COLOCATED = "colocated"
    SPLIT_EQUAL = "split, equal hardware"
    SPLIT_UNEQUAL = "split, unequal hardware"


@dataclass(frozen=True, slots=True)
class Design:
    """``prefill`` None: colocated.  ``step_tokens``: of the workers that compute prompts, ``mixed_tokens``: of prompts
    in a decode worker's steps while others decode there.  ``patience``: of the gateway's line, which decides who is late
    where not all can be in time."""

    decode: Worker
    prefill: Worker | None
    step_tokens: int
    mixed_tokens: int
    patience: float

    @staticmethod
    def colocated(worker: Worker, chunk_tokens: int, patience: float) -> Design:
        return Design(worker, None, max(chunk_tokens, ALONE_STEP_TOKENS), chunk_tokens, patience)

    @staticmethod
    def split(prefill: Worker, decode: Worker, step_tokens: int, patience: float) -> Design:
        return Design(decode, prefill, step_tokens, step_tokens, patience)

    @property
    def kind(self) -> Kind:
        if self.prefill is None:
            return Kind.COLOCATED
        return Kind.SPLIT_EQUAL if self.prefill.device.name == self.decode.device.name else Kind.SPLIT_UNEQUAL


@dataclass(frozen=True, slots=True)
class Size:
    """Workers; ``num_prefill`` 0 of a colocated design."""

    num_prefill: int
    num_decode: int


def pool(worker: Worker, num_workers: int, step_tokens: int, mixed_tokens: int = 0) -> Pool:
    running = min(worker.max_running, step_tokens // 2)
    return Pool(num_workers, worker.cost, step_tokens, worker.kv_tokens, running, mixed_tokens=mixed_tokens)


def fleet(design: Design, size: Size) -> Fleet:
    decode = pool(design.decode, size.num_decode, design.step_tokens, design.mixed_tokens)
    gateway = Gateway(patience=design.patience)
    if design.prefill is None:
        return Fleet(decode, gateway=gateway)
    return Fleet(
        decode,
        pool(design.prefill, size.num_prefill, design.step_tokens),
        Link(
            design.prefill.kv_token_nbytes, design.prefill.link_bytes_per_s, design.decode.link_bytes_per_s,
            max(design.prefill.round_trip_s, design.decode.round_trip_s),
        ),
        gateway,
    )  # fmt: skip


def usd_per_hour(design: Design, size: Size) -> float:
    """Of whole instances, where devices are rented so: workers of both roles share them."""
    return sum(device.usd_per_hour * _paid(device, count) for device, count in _devices(design, size))


def paid_for(design: Design, count: int) -> int:
    """Colocated workers that the instances of ``count`` have room for."""
    return _paid(design.decode.device, count * design.decode.tp) // design.decode.tp


def instances(design: Design, size: Size) -> dict[str, int]:
    """Whole ones, by name."""
    return {
        device.instance: _paid(device, count) // device.rented
        for device, count in _devices(design, size)
        if device.rented
    }  # fmt: skip


def _devices(design: Design, size: Size) -> list[tuple[Device, int]]:
    """Those that workers use, each once, and how many."""
    decode, writers = design.decode, design.prefill
    count = size.num_decode * decode.tp
    if writers is None:
        return [(decode.device, count)]
    written = size.num_prefill * writers.tp
    if design.kind is Kind.SPLIT_EQUAL:
        return [(decode.device, count + written)]
    return [(writers.device, written), (decode.device, count)]


def _paid(device: Device, count: int) -> int:
    """With whole instances; ranks that divide them, by powers of two, leave no gap within one."""
    return device.rented * ceil(count / device.rented) if device.rented else count


def num_devices(design: Design, size: Size) -> int:
    return sum(count for _, count in _devices(design, size))


def workers(model: ModelShape, catalogue: Catalogue, dtype: str, names: Iterable[str]) -> list[Worker]:
    """Of each device, with every number of ranks that holds the model."""
    found: list[Worker] = []
    for name in names:
        made = (make_worker(model, catalogue.devices[name], tp, dtype) for tp in TPS)
        found += [worker for worker in made if worker is not None]
    return found


def colocated_designs(among: Sequence[Worker], patience: float) -> list[Design]:
    return [Design.colocated(worker, chunk_tokens, patience) for worker in among for chunk_tokens in COLOCATED_CHUNKS]
