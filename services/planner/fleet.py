"""A fleet in virtual time, coarse and fast: fleet.c, by ctypes.

Requests wait in the gateway's line and go where they are best off, once there is room, as gateway/admission.py and
gateway/costs.py have it: to the prefill worker with the least to do, or to the decode worker alone where what all who
are there lose to its prompt weighs less than what it, and those behind it, lose by waiting.  A prefill worker takes
prompts in their order, up to ``step_tokens`` a step, and writes each chunk while it computes the next, over a link of
its own and one of the decode worker's, both of which carry one thing after the other.  A decode worker computes one
token of each of its sequences a step; also prompts that were sent to it, with what is left of ``step_tokens`` or in
steps of their own.  Room for prompt and answer is set aside before a prompt is computed, so nobody is preempted.
Cached tokens are not computed but are kept, and written, like the others.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from gateway.admission import PATIENCE, Objectives
from gateway.costs import HORIZON_TOKENS, STALL_WEIGHT
from kvferry.errors import InternalError, UnavailableError
from services.planner.build import FLEET
from services.planner.step_cost import StepCost
from services.planner.traffic import Seconds, Tokens, Traffic

_NUM_TERMS, _NUM_BUCKETS, _FROM_S, _GROWTH = 6, 1024, 1e-5, 1.02


@dataclass(frozen=True, slots=True)
class Pool:
    """Equal workers.  A step has ``step_tokens`` at most, and ``mixed_tokens`` of prompts while others decode (0: no such
    bound).  ``kv_tokens`` fit in the pool of each, ``max_running`` sequences in a step.  ``prompts_alone``: while
    there are prompts to compute nobody decodes, as in engines before chunked prefill."""

    num_workers: int
    cost: StepCost
    step_tokens: int
    kv_tokens: int
    max_running: int = 256
    prompts_alone: bool = False
    mixed_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Link:
    """``kv_token_nbytes``: of a token's KV on its way; ``out_bytes_per_s`` of each prefill worker, ``in_bytes_per_s`` of
    each decode worker; a handover takes two round trips."""

    kv_token_nbytes: float
    out_bytes_per_s: float
    in_bytes_per_s: float
    round_trip_s: float


@dataclass(frozen=True, slots=True)
class Gateway:
    """``max_queue_s``: so much prompt work may wait on a worker before the rest does in the line.  ``decode_computes``:
    whether decode workers beside prefill workers may compute a prompt themselves; ``stall_weight``: what a second counts
    that their streams lose to it.  ``patience``: in the line a request lets others go first until it has waited so many
    times what its own prompt takes.  ``dispatch_s``: until a worker has what was sent to it, and its caller hears of it."""

    max_queue_s: float = Objectives().max_queue_s
    decode_computes: bool = True
    stall_weight: float = STALL_WEIGHT
    patience: float = PATIENCE
    dispatch_s: float = 0.0


# Others' gateways: who comes is sent at once where there is KV, in the order of arrival, and beside prefill workers decode
# workers only decode.
AT_ONCE = Gateway(inf, decode_computes=False, patience=0.0)


@dataclass(frozen=True, slots=True)
class Fleet:
    """``prefill`` and ``link`` None: colocated."""

    decode: Pool
    prefill: Pool | None = None
    link: Link | None = None
    gateway: Gateway = Gateway()


@dataclass(frozen=True, slots=True)
class Run:
    """By request, seconds from the run's start; infinite for one that fits in no pool.  The first token is out when the
    prompt is computed, the second after the handover and a step; ``num_slow`` of the gaps between tokens were longer than
    the bound that was given.  By worker, prefill first: seconds it computed, tokens of prompts and of answers.
    ``gaps``: how many gaps between tokens lie in each bucket."""

    traffic: Traffic
    num_prefill: int
    first_s: Seconds
    second_s: Seconds
    end_s: Seconds
    num_slow: Tokens
    busy_s: Seconds
    prefill_tokens: Seconds
    decode_tokens: Seconds
    gaps: Seconds
    end_of_all_s: float
    num_steps: int

    @property
    def ttft_s(self) -> Seconds:
        return self.first_s - self.traffic.arrive_s

    @property
    def tpot_s(self) -> Seconds:
        """Mean gap of each request; 0 where there is none."""
        with np.errstate(invalid="ignore"):
            spent = np.where(np.isfinite(self.end_s), self.end_s - self.first_s, np.inf)
        return spent / np.maximum(1, self.traffic.num_output - 1)

    @property
    def e2e_s(self) -> Seconds:
        return self.end_s - self.traffic.arrive_s

    def itl_s(self, rank: float) -> float:
        """Percentile of all gaps between tokens, 2 % too long at most; 0 without any."""
        total = self.gaps.sum()
        if not total:
            return 0.0
        bucket = int(np.searchsorted(np.cumsum(self.gaps), rank / 100 * total))
        return _FROM_S * _GROWTH ** (min(bucket, _NUM_BUCKETS - 1) + 1)


class _Cost(Structure):
    _fields_ = [
        ("additive", c_double * _NUM_TERMS), ("compute", c_double * _NUM_TERMS), ("memory", c_double * _NUM_TERMS),
        ("expert_s", c_double), ("expert_rate", c_double), ("spread", c_double),
    ]  # fmt: skip


class _Pool(Structure):
    _fields_ = [
        ("num_workers", c_int64), ("step_tokens", c_int64), ("mixed_tokens", c_int64), ("kv_tokens", c_int64),
        ("max_running", c_int64), ("prompts_alone", c_int64),
        ("cost", _Cost),
    ]  # fmt: skip


class _Fleet(Structure):
    _fields_ = [
        ("prefill", _Pool), ("decode", _Pool), ("kv_token_nbytes", c_double), ("out_bytes_per_s", c_double),
        ("in_bytes_per_s", c_double), ("round_trip_s", c_double), ("itl_bound_s", c_double),
        ("request_weight", c_double), ("token_s", c_double * 2), ("max_queue_s", c_double),
        ("stall_weight", c_double), ("patience", c_double), ("dispatch_s", c_double), ("decode_computes", c_int64),
    ]  # fmt: skip


class _Result(Structure):
    _fields_ = [
        ("first_s", c_void_p), ("second_s", c_void_p), ("end_s", c_void_p), ("num_slow", c_void_p),
        ("busy_s", c_void_p), ("prefill_tokens", c_void_p), ("decode_tokens", c_void_p), ("gaps", c_void_p),
        ("end_of_all_s", c_double), ("num_steps", c_double),
    ]  # fmt: skip


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(FLEET.build()))
    except (RuntimeError, OSError) as error:
        raise UnavailableError(str(error)) from error
    library.kvp_run.restype = ctypes.c_int
    library.kvp_run.argtypes = [
        POINTER(_Fleet), c_int64, c_void_p, c_void_p, c_void_p, c_void_p, POINTER(_Result)
    ]  # fmt: skip
    return library


def simulate(fleet: Fleet, traffic: Traffic, itl_bound_s: float = float("inf")) -> Run:
    """Until everything is answered; the same every time.  Holds no GIL.  Raises UnavailableError where the simulator cannot
    be compiled."""
    num_requests = len(traffic)
    prefill = fleet.prefill
    num_prefill = prefill.num_workers if prefill else 0
    num_workers = num_prefill + fleet.decode.num_workers
    first_s, second_s, end_s = (np.zeros(num_requests) for _ in range(3))
    num_slow = np.zeros(num_requests, np.int32)
    busy_s, prefill_tokens, decode_tokens = (np.zeros(num_workers) for _ in range(3))
    gaps = np.zeros(_NUM_BUCKETS)
    arrays: list[NDArray[np.float64] | NDArray[np.int32]] = [
        first_s, second_s, end_s, num_slow, busy_s, prefill_tokens, decode_tokens, gaps
    ]  # fmt: skip
    result = _Result(*(array.ctypes.data for array in arrays), 0.0, 0.0)
    link = fleet.link or Link(0.0, 1.0, 1.0, 0.0)
    token_s = (_token_s(prefill) if prefill else 0.0, _token_s(fleet.decode))
    request = _Fleet(
        _pool(prefill) if prefill else _Pool(), _pool(fleet.decode), link.kv_token_nbytes, link.out_bytes_per_s,
        link.in_bytes_per_s, link.round_trip_s, itl_bound_s, _request_weight(fleet, traffic, token_s[1]),
        (c_double * 2)(*token_s), fleet.gateway.max_queue_s, fleet.gateway.stall_weight,
        fleet.gateway.patience, fleet.gateway.dispatch_s, fleet.gateway.decode_computes,
    )  # fmt: skip
    given: list[NDArray[np.float64] | NDArray[np.int32]] = [
        np.ascontiguousarray(traffic.arrive_s, np.float64),
        *(np.ascontiguousarray(a, np.int32) for a in (traffic.num_input, traffic.num_output, traffic.num_cached)),
    ]
    status = _library().kvp_run(
        ctypes.byref(request), num_requests, *(array.ctypes.data for array in given), ctypes.byref(result)
    )
    if status == 1:
        raise UnavailableError(f"no memory to simulate {num_requests} requests; plan a shorter trace")
    if status:
        raise InternalError("the fleet simulator ended with requests unanswered or KV held; please report it")
    return Run(
        traffic, num_prefill, first_s, second_s, end_s, num_slow, busy_s, prefill_tokens, decode_tokens, gaps,
        result.end_of_all_s, int(result.num_steps),
    )  # fmt: skip


def _pool(pool: Pool) -> _Pool:
    # With fewer tokens than sequences a step would have none for prompts.
    assert pool.step_tokens > 0
    cost = pool.cost
    terms = c_double * _NUM_TERMS
    return _Pool(
        pool.num_workers, pool.step_tokens, pool.mixed_tokens or pool.step_tokens, pool.kv_tokens, pool.max_running,
        pool.prompts_alone,
        _Cost(
            terms(*cost.additive), terms(*cost.compute), terms(*cost.memory), cost.expert_s, cost.expert_rate, cost.spread
        ),
    )  # fmt: skip


def _token_s(pool: Pool) -> float:
    """A queued prompt token, by what all of a full chunk's take, step and weights included."""
    tokens = float(pool.step_tokens)
    return pool.cost.step_s((1.0, tokens, tokens * tokens / 2, tokens, 0.0, 0.0)) / tokens


def _request_weight(fleet: Fleet, traffic: Traffic, token_s: float) -> float:
    """Seconds that a request on a decode worker costs who comes next: slower steps and, where that worker computes the
    next one's prompt, its own stall meanwhile, which counts in the next one's place (ADR 15)."""
    length = float(traffic.num_input.mean() - traffic.num_cached.mean())
    one, two = (fleet.decode.cost.step_s((1.0, 0.0, 0.0, 0.0, n, n * length)) for n in (32.0, 33.0))
    stall_s = 0.0 if fleet.prefill else token_s * length
    return max(stall_s + HORIZON_TOKENS * (two - one), 1e-12)  # fewer are better even where steps take nothing
