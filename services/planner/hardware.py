"""The catalogue of hardware, and what a step costs on it.  Pure but for the reading of files."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from kvferry.errors import InvalidRequestError
from services.planner.models import WEIGHT_NBYTES, ModelShape
from services.planner.simulator.cost_model import CostModel
from services.planner.step_cost import StepCost, calibrated

DEFAULT_CATALOGUE = Path(__file__).with_name("hardware.toml")
# Of a hidden state, as ranks exchange it.
_ACTIVATION_NBYTES = 2


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Shares of peaks that are reached, and what no data sheet has.  See hardware.toml."""

    mfu: float
    mbu: float
    link_efficiency: float
    step_overhead_ms: float
    all_reduce_us: float
    round_trip_ms: float
    memory_share: float
    max_running: int
    prefix_cache_gbytes: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Step times of one model on one device that were measured, in place of a roofline.  ``block_nbytes`` of a block of
    ``block_size`` tokens; ``kv_tokens`` fit in the pool."""

    costs: CostModel
    block_nbytes: int
    block_size: int
    kv_tokens: int

    @property
    def kv_token_nbytes(self) -> float:
        return self.block_nbytes / self.block_size


@dataclass(frozen=True, slots=True)
class Device:
    """``link_*``: of one device, one direction, between nodes; ``node_link_*`` between the devices of a node, 0: none.
    ``usd_per_hour``: of one.  ``rented``: so many at a time, a whole ``instance``; 0: as many as one likes."""

    name: str
    peak_tflops: Mapping[str, float]
    bandwidth_gbytes_per_s: float
    memory_gbytes: float
    node_link_gbytes_per_s: float
    link_gbytes_per_s: float
    usd_per_hour: float
    assumptions: Assumptions
    measured: Measured | None = None
    rented: int = 0
    instance: str = ""


@dataclass(frozen=True, slots=True)
class Catalogue:
    """``devices``: by what they are called in it, instances too, as the devices that one has."""

    dated: str
    assumptions: Assumptions
    devices: Mapping[str, Device]

    @property
    def one_by_one(self) -> list[str]:
        """Those that are no instances."""
        return [name for name, device in self.devices.items() if not device.rented]

    def with_slower_links(self, factor: float) -> Catalogue:
        """Those between nodes."""

        def slower(device: Device) -> Device:
            measured = device.measured
            if measured is not None:
                rate = measured.costs.transfer_bytes_per_s / factor
                measured = replace(measured, costs=replace(measured.costs, transfer_bytes_per_s=rate))
            return replace(device, link_gbytes_per_s=device.link_gbytes_per_s / factor, measured=measured)

        return replace(self, devices={name: slower(device) for name, device in self.devices.items()})


@dataclass(frozen=True, slots=True)
class Worker:
    """A model on ``tp`` devices of one node."""

    device: Device
    tp: int
    cost: StepCost
    kv_tokens: int
    kv_token_nbytes: float
    link_bytes_per_s: float
    round_trip_s: float
    max_running: int

    @property
    def usd_per_hour(self) -> float:
        return self.tp * self.device.usd_per_hour

    def __str__(self) -> str:
        return f"{self.tp}x{self.device.name}" if self.tp > 1 else self.device.name


def make_worker(model: ModelShape, device: Device, tp: int, dtype: str, kv_dtype: str = "bf16") -> Worker | None:
    """None where the model does not run so: too little memory, no such type, heads that do not part."""
    a = device.assumptions
    if device.measured is not None:
        if tp > 1:
            return None
        m = device.measured
        return Worker(
            device, 1, calibrated(m.costs), m.kv_tokens, m.kv_token_nbytes, m.costs.transfer_bytes_per_s,
            m.costs.round_trip_s, a.max_running,
        )  # fmt: skip
    peak_tflops = device.peak_tflops.get(dtype)
    if peak_tflops is None or model.num_heads % tp or (tp > 1 and not device.node_link_gbytes_per_s):
        return None
    if device.rented % tp:
        return None
    kv_nbytes = model.kv_token_nbytes(kv_dtype)
    copies = max(1.0, tp / model.num_kv_shards) if model.num_kv_shards else 1.0
    room = tp * device.memory_gbytes * 1e9 * a.memory_share - model.weights_nbytes(dtype)
    if room < kv_nbytes * copies * 1024:
        return None
    return Worker(
        device, tp, roofline(model, device, tp, dtype, kv_nbytes * copies), int(room / (kv_nbytes * copies)), kv_nbytes,
        tp * device.link_gbytes_per_s * 1e9 * a.link_efficiency, a.round_trip_ms / 1e3, a.max_running,
    )  # fmt: skip


def roofline(model: ModelShape, device: Device, tp: int, dtype: str, kv_nbytes: float) -> StepCost:
    """FLOPs over what is reached of the peak, or bytes over what is reached of the bandwidth, whichever is longer; besides
    the overhead of a step, and the all-reduces of ``tp`` ranks (two a layer, ring: 2 (tp - 1) / tp of the hidden states).
    ``kv_nbytes``: of a token in all ranks together."""
    a = device.assumptions
    flops = device.peak_tflops[dtype] * 1e12 * tp * a.mfu
    bandwidth = device.bandwidth_gbytes_per_s * 1e9 * tp * a.mbu
    weight = WEIGHT_NBYTES[dtype]
    overhead_s, row_s = a.step_overhead_ms / 1e3, 0.0
    if tp > 1:
        overhead_s += 2 * model.num_layers * a.all_reduce_us / 1e6
        moved = 2 * model.num_layers * model.hidden_size * _ACTIVATION_NBYTES * 2 * (tp - 1) / tp
        row_s = moved / (device.node_link_gbytes_per_s * 1e9 * a.link_efficiency)
    token_s = 2 * model.num_active / flops
    kv_s = kv_nbytes / bandwidth
    return StepCost(
        additive=(overhead_s, row_s, 0.0, 0.0, row_s, 0.0),
        compute=(
            0.0, token_s, model.prompt_pair_flops / flops, 0.0, token_s + 2 * model.num_head / flops,
            model.decode_pair_flops / flops,
        ),
        memory=((model.num_dense + model.num_head) * weight / bandwidth, kv_s, 0.0, kv_s, kv_s, kv_s),
        expert_s=model.num_routed * weight / bandwidth,
        expert_rate=model.expert_rate,
    )  # fmt: skip


def read_catalogue(path: Path) -> Catalogue:
    """Raises InvalidRequestError, which names the table and the key."""
    try:
        read = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # tomllib passes on what int() and deep nesting raise
        raise InvalidRequestError(f"{path} is no TOML: {error}") from error
    known = {"dated", "assumptions", "devices", "instances"}
    if unknown := sorted(set(read) - known):
        raise InvalidRequestError(f"{path}: {unknown[0]!r} means nothing; there are {', '.join(sorted(known))}")
    names = [field.name for field in fields(Assumptions)]
    values = _numbers(path, "assumptions", read.get("assumptions", {}), names)
    if missing := [name for name in names if name not in values]:
        raise InvalidRequestError(f"{path}: [assumptions] lacks {missing[0]}")
    assumptions = Assumptions(**{**values, "max_running": int(values["max_running"])})  # type: ignore[arg-type]
    devices = read.get("devices")
    if not isinstance(devices, dict) or not devices:
        raise InvalidRequestError(f"{path} has no [devices.NAME]")
    made = {n: _device(path, n, d, assumptions) for n, d in devices.items()}
    instances = read.get("instances", {})
    if not isinstance(instances, dict):
        raise InvalidRequestError(f"{path}: instances is no table; write [instances.NAME]")
    made |= {n: _instance(path, n, i, made) for n, i in instances.items()}
    return Catalogue(str(read.get("dated", "undated")), assumptions, made)


_DEVICE = ("bandwidth_gbytes_per_s", "memory_gbytes", "node_link_gbytes_per_s", "link_gbytes_per_s", "usd_per_hour")
_MEASURED = ("usd_per_hour", "kv_tokens")


def _device(path: Path, name: str, given: Any, assumptions: Assumptions) -> Device:
    where = f"devices.{name}"
    if not isinstance(given, dict):
        raise InvalidRequestError(f"{path}: {where} is no table")
    own = ("mfu", "mbu", "link_efficiency", "step_overhead_ms", "memory_share", "max_running")
    if "costs" in given:
        values = _numbers(path, where, given, (*_MEASURED, "max_running"), besides=("costs",))
        _require(path, where, values, _MEASURED)
        assumed = replace(assumptions, max_running=int(values.get("max_running", assumptions.max_running)))
        measured = _measured(path.parent / str(given["costs"]), int(values["kv_tokens"]))
        return Device(name, {}, 0.0, 0.0, 0.0, 0.0, values["usd_per_hour"], assumed, measured)
    values = _numbers(path, where, given, (*_DEVICE, *own), besides=("peak_tflops",))
    _require(path, where, values, _DEVICE)
    peaks = _numbers(path, f"{where}.peak_tflops", given.get("peak_tflops"), tuple(WEIGHT_NBYTES))
    if not peaks:
        raise InvalidRequestError(f"{path}: [{where}] lacks peak_tflops, such as {{ bf16 = 989.0 }}")
    changed: dict[str, Any] = {key: values[key] for key in own if key in values}
    if "max_running" in changed:
        changed["max_running"] = int(changed["max_running"])
    bandwidth, memory, node_link, link, usd = (values[key] for key in _DEVICE)
    return Device(name, peaks, bandwidth, memory, node_link, link, usd, replace(assumptions, **changed))


_INSTANCE = ("count", "usd_per_hour")


def _instance(path: Path, name: str, given: Any, devices: Mapping[str, Device]) -> Device:
    """The device that it has ``count`` of, at its share of the price."""
    where = f"instances.{name}"
    if name in devices:
        raise InvalidRequestError(f"{path}: [{where}] has the name of a device")
    values = _numbers(path, where, given, (*_INSTANCE, "link_gbytes_per_s"), besides=("device",))
    _require(path, where, values, _INSTANCE)
    device = devices.get(str(given.get("device")))
    if device is None:
        raise InvalidRequestError(
            f"{path}: [{where}] says device = {given.get('device')!r}; there are {', '.join(devices)}"
        )
    if device.measured is not None and "link_gbytes_per_s" in values:
        raise InvalidRequestError(
            f"{path}: [{where}] has link_gbytes_per_s; the costs of {device.name} hold what was measured"
        )
    count = values["count"]
    if count != int(count):
        raise InvalidRequestError(f"{path}: [{where}] says count = {count:g}; it must be a whole number")
    return replace(
        device, name=f"{device.name}@{name}", instance=name, rented=int(count), usd_per_hour=values["usd_per_hour"] / count,
        link_gbytes_per_s=values.get("link_gbytes_per_s", device.link_gbytes_per_s),
    )  # fmt: skip


def _measured(path: Path, kv_tokens: int) -> Measured:
    """A file as `kvferry calibrate` and `make bench-routing ARGS="--costs FILE"` write it."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        return Measured(CostModel(**read["costs"]), read["block_nbytes"], read.get("block_size", 16), kv_tokens)
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidRequestError(f"{path} holds no measured costs: {error!r}") from error


def _numbers(
    path: Path, where: str, given: Any, known: tuple[str, ...] | list[str], besides: tuple[str, ...] = ()
) -> dict[str, float]:
    if not isinstance(given, dict):
        raise InvalidRequestError(f"{path}: [{where}] is missing or no table")
    values = {}
    for key, value in given.items():
        if key in besides:
            continue
        if key not in known:
            raise InvalidRequestError(f"{path}: [{where}] has {key!r}; there are {', '.join((*known, *besides))}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise InvalidRequestError(f"{path}: [{where}] says {key} = {value!r}; it must be a number, 0 or more")
        if value == 0 and key != "node_link_gbytes_per_s":
            raise InvalidRequestError(f"{path}: [{where}] says {key} = 0; it must be more than 0")
        values[key] = float(value)
    return values


def _require(path: Path, where: str, values: Mapping[str, float], keys: tuple[str, ...]) -> None:
    if missing := [key for key in keys if key not in values]:
        raise InvalidRequestError(f"{path}: [{where}] lacks {missing[0]}")
