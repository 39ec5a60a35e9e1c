"""What it would cost to serve a request somewhere, in seconds.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from math import inf

from gateway.candidates import Candidate, Rates, Role, WorkerKey
from gateway.pulls import Pull, Pulls
from services.runtime.place import Distance, Place, distance_between

# For as long as no worker of the model has measured the quantity: the order of a small model on a few cores.
PRIOR = Rates(
    prefill_tokens_per_s=1000.0, step_base_s=0.02, step_per_sequence_s=0.001, transfer_bytes_per_s=1e9,
    transfer_round_trip_s=0.001, host_load_bytes_per_s=2e9, pull_bytes_per_s=1e9, pull_overhead_s=0.005,
)  # fmt: skip
# Nobody knows how long an answer gets: load on a decode worker counts for this many steps at most.
HORIZON_TOKENS = 64
# A split request has a ticket fetched and a commit answered before its first step.
HANDOVER_ROUND_TRIPS = 2
# A second that a running stream loses weighs as much as so many that somebody waits for a first token.
STALL_WEIGHT = 5.0


@dataclass(frozen=True, slots=True)
class Demand:
    """``max_tokens``: how many the answer may have."""

    num_prompt_tokens: int
    max_tokens: int


def num_reckoned_steps(demand: Demand) -> int:
    return max(1, min(demand.max_tokens, HORIZON_TOKENS))


def num_needed_blocks(decode: Candidate, demand: Demand) -> int:
    """Of the decode worker's, until the answer's end as far as that can be foreseen."""
    num_answer_tokens = max(1, min(demand.max_tokens, decode.num_expected_answer_tokens))
    return decode.num_missing_blocks(demand.num_prompt_tokens + num_answer_tokens) + decode.num_prefix_host_blocks


@dataclass(frozen=True, slots=True)
class Terms:
    """Seconds.  ``queue_s`` until the prompt's turn, ``pull_s`` for cached blocks that are read from another worker first,
    ``prefill_s`` for what is then not cached, and for copying what the host has, ``ship_s`` for the handover and
    the bytes that the decode worker lacks, ``stall_s`` that the requests of a decode worker lose while it computes the
    prompt itself, as they are weighed, ``evict_s`` that others will wait for what made room for pulled blocks,
    ``decode_s`` for the answer's first steps in the batch as it is."""

    queue_s: float
    pull_s: float
    prefill_s: float
    ship_s: float
    stall_s: float
    evict_s: float
    decode_s: float

    @property
    def work_s(self) -> float:
        """For the prompt, once its turn has come."""
        return self.pull_s + self.prefill_s

    @property
    def total_s(self) -> float:
        return self.queue_s + self.pull_s + self.prefill_s + self.ship_s + self.stall_s + self.evict_s + self.decode_s


@dataclass(frozen=True, slots=True)
class Option:
    """``prefill`` None: the decode worker computes the prompt itself.  ``full``: it has too few blocks to begin.  ``pull``:
    what whoever computes the prompt reads from a third worker, or from the decode worker, before it does."""

    decode: Candidate
    prefill: Candidate | None
    terms: Terms
    full: bool
    pull: Pull | None = None

    @property
    def rank(self) -> tuple[bool, float, int, str, str]:
        """The lowest is the best: unequal for any two options of one view."""
        prefill_id = self.prefill.key.worker_id if self.prefill else ""
        return (self.full, self.terms.total_s, self.decode.num_requests, self.decode.key.worker_id, prefill_id)

    def __str__(self) -> str:
        ms = [f"{s * 1000:.1f}" for s in (*astuple(self.terms), self.terms.total_s)]
        prefill = f"{self.prefill.key.worker_id}>" if self.prefill else ""
        pull = f"{self.pull.holder.key.worker_id}:" if self.pull else ""
        full = " full" if self.full else ""
        return f"{pull}{prefill}{self.decode.key.worker_id} {'+'.join(ms[:-1])}={ms[-1]}ms{full}"


@dataclass(frozen=True, slots=True)
class _Writing:
    """What a prefill worker needs, whoever decodes; and its speed for what depends on that."""

    queue_s: float
    pull: Pull | None
    pull_s: float
    prefill_s: float
    evict_s: float
    place: Place
    ways: Sequence[tuple[float, float]]  # by distance: seconds of the handover, bytes a second

    @property
    def computed_s(self) -> float:
        """When the prompt will have been computed."""
        return self.queue_s + self.pull_s + self.prefill_s

    def ship_s(self, num_bytes: int, to: Place) -> float:
        handover_s, bytes_per_s = self.ways[distance_between(self.place, to)]
        return handover_s + num_bytes / bytes_per_s


class Costs:
    """Of one request, among the workers of one view, given in the order of their ids: means are rounded.

    Where a worker has not measured a rate, it gets the mean of its role's workers that have, else that of all; where
    nobody has, ``PRIOR`` holds.  So a worker that has just joined is neither shunned nor flooded.

    Writing overlaps with computing, so ``ship_s`` is an upper bound: it counts what occupies the link.  What a decode
    worker copies from its host meanwhile is taken to be hidden behind it.  Where prompts can be shipped a decode worker
    is taken to have at least one request to stall: an idle one will not be idle for long, and so a prompt is shipped
    where that is quicker than computing it.  Requests there whose prompts are still on their way count too: they will
    stream before long.
    """

    def __init__(
        self, candidates: Sequence[Candidate], demand: Demand, *, pulls: bool = True,
        stall_weight: float | None = STALL_WEIGHT,
    ) -> None:  # fmt: skip
        """``pulls``: whether cached blocks may be read from other workers.  ``stall_weight``: what a second counts that
        the requests of a decode worker lose; None where nobody could spare them, as some worker's requests lose it
        wherever the prompt is computed, unless there is one that has none."""
        self._demand = demand
        self._num_steps = num_reckoned_steps(demand)
        self._rates = _completed(tuple((c.key, c.role, c.rates) for c in candidates))
        self._pulls = Pulls(candidates if pulls else (), self._rates, demand.num_prompt_tokens)
        self._ways = _Ways(candidates)
        self._writing = {c.key: self._writing_on(c) for c in candidates if c.role is Role.PREFILL}
        self._stall_weight, self._least_stalled = (1.0, 0.0) if stall_weight is None else (stall_weight, 1.0)

    def alone(self, decode: Candidate) -> Option:
        rates, pull = self._rates[decode.key], self._pulls.best(decode)
        prefill_s = self._prefill_s(decode, rates, pull)
        terms = Terms(
            queue_s=decode.num_queued_prefill_tokens / rates.prefill_tokens_per_s,
            pull_s=pull.pull_s if pull else 0.0,
            prefill_s=prefill_s,
            ship_s=0.0,
            stall_s=prefill_s * max(self._least_stalled, self._stall_weight * decode.num_requests),
            evict_s=pull.evict_s if pull else 0.0,
            decode_s=self._decode_s(decode),
        )
        return Option(decode, None, terms, self.is_full(decode), pull)

    def split(self, decode: Candidate, prefill: Candidate) -> Option:
        writing = self._writing[prefill.key]
        terms = Terms(
            queue_s=writing.queue_s,
            pull_s=writing.pull_s,
            prefill_s=writing.prefill_s,
            ship_s=writing.ship_s(self._num_missing_bytes(decode), decode.place),
            stall_s=0.0,
            evict_s=writing.evict_s,
            decode_s=self._decode_s(decode),
        )
        return Option(decode, prefill, terms, self.is_full(decode), writing.pull)

    def explain_pull(self, option: Option) -> str:
        """Why whoever computes the prompt does or does not read cached blocks first, in words; empty where nobody has any
        that it lacks."""
        return self._pulls.explain(option.prefill or option.decode)

    def soonest_first(self, writers: Sequence[Candidate]) -> list[Candidate]:
        """By when they will have computed the prompt."""
        return sorted(writers, key=lambda writer: self._writing[writer.key].computed_s)

    def best(self, alone: Option, writers: Sequence[Candidate]) -> Option:
        """Of all that decode where ``alone`` does: by rank, but without making each one, of which there are many.
        ``writers`` come as ``soonest_first`` has them: of a thousand, all but a few would be later even if shipping took no
        time."""
        decode = alone.decode
        num_bytes, decode_s = self._num_missing_bytes(decode), alone.terms.decode_s
        chosen, least = None, (alone.terms.total_s, "")
        for writer in writers:
            w = self._writing[writer.key]
            # The same additions in the same order as a total's, so that rounding makes no other order.
            if w.computed_s + 0.0 + decode_s > least[0]:
                break
            total_s = w.computed_s + w.ship_s(num_bytes, decode.place) + 0.0 + w.evict_s + decode_s
            rank = (total_s, writer.key.worker_id)
            if rank < least:
                chosen, least = writer, rank
        return alone if chosen is None else self.split(decode, chosen)

    def is_full(self, decode: Candidate) -> bool:
        return num_needed_blocks(decode, self._demand) > decode.num_free_blocks

    def _prefill_s(self, worker: Candidate, rates: Rates, pull: Pull | None) -> float:
        """What is pulled comes first in the prompt, and nothing of it is copied from the host."""
        if pull is not None:
            return (self._demand.num_prompt_tokens - pull.total_blocks * worker.block_size) / rates.prefill_tokens_per_s
        compute_s = worker.num_uncached(self._demand.num_prompt_tokens) / rates.prefill_tokens_per_s
        return compute_s + worker.num_prefix_host_blocks * worker.block_nbytes / rates.host_load_bytes_per_s

    def _num_missing_bytes(self, decode: Candidate) -> int:
        return decode.num_missing_blocks(self._demand.num_prompt_tokens) * decode.block_nbytes

    def _writing_on(self, prefill: Candidate) -> _Writing:
        rates, pull = self._rates[prefill.key], self._pulls.best(prefill)
        return _Writing(
            queue_s=prefill.num_queued_prefill_tokens / rates.prefill_tokens_per_s,
            pull=pull,
            pull_s=pull.pull_s if pull else 0.0,
            prefill_s=self._prefill_s(prefill, rates, pull),
            evict_s=pull.evict_s if pull else 0.0,
            place=prefill.place,
            ways=self._ways.of(prefill, rates),
        )

    def _decode_s(self, decode: Candidate) -> float:
        rates = self._rates[decode.key]
        return self._num_steps * (rates.step_base_s + (decode.num_requests + 1) * rates.step_per_sequence_s)


# Of one worker, whose rates are the same object from one report to the next.
_Known = tuple[WorkerKey, Role, Rates]


@lru_cache(maxsize=4)
def _completed(workers: tuple[_Known, ...]) -> dict[WorkerKey, Rates]:
    """Kept, for it depends on no request, and took a tenth of one's time."""
    fill_prefill = _Filler(workers, lambda r: (r.prefill_tokens_per_s,))
    fill_step = _StepFiller(workers)
    fill_bytes = _Filler(workers, lambda r: (r.transfer_bytes_per_s,))
    fill_trip = _Filler(workers, lambda r: (r.transfer_round_trip_s,))
    fill_host = _Filler(workers, lambda r: (r.host_load_bytes_per_s,))
    fill_pull = _Filler(workers, lambda r: (r.pull_bytes_per_s,))
    fill_overhead = _Filler(workers, lambda r: (r.pull_overhead_s,))
    fillers = (fill_prefill, fill_step, fill_bytes, fill_trip, fill_host, fill_pull, fill_overhead)
    return {w[0]: Rates(*(value for filler in fillers for value in filler.of(w))) for w in workers}


class _Ways:
    """How a writer reaches owners at each distance.  What it has not measured of one distance is what others measured of
    it, on average; where nobody did, the writer's rate for all."""

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self._typical: dict[Distance, tuple[float | None, float | None]] = {}
        for distance in Distance:
            rates = [r for c in candidates for r in c.transfer_rates if r.distance is distance]
            self._typical[distance] = (
                _mean_of([r.round_trip_s for r in rates]), _mean_of([r.bytes_per_s for r in rates]),
            )  # fmt: skip

    def of(self, writer: Candidate, rates: Rates) -> list[tuple[float, float]]:
        """By the distance's number."""
        own = {r.distance: (_measured(r.round_trip_s), _measured(r.bytes_per_s)) for r in writer.transfer_rates}
        ways = [(0.0, 0.0)] * (max(Distance) + 1)
        for distance, typical in self._typical.items():
            measured = own.get(distance, (None, None))
            trip_s = measured[0] or typical[0] or rates.transfer_round_trip_s
            ways[distance] = HANDOVER_ROUND_TRIPS * trip_s, measured[1] or typical[1] or rates.transfer_bytes_per_s
        return ways


def _measured(value: float) -> float | None:
    return value if _is_measured((value,)) else None


def _mean_of(values: Sequence[float]) -> float | None:
    measured = [value for value in values if _measured(value)]
    return sum(measured) / len(measured) if measured else None


_Quantity = tuple[float, ...]


class _Filler:
    """One quantity of the rates, for those who have not measured it too."""

    def __init__(self, workers: Sequence[_Known], pick: Callable[[Rates], _Quantity]) -> None:
        self._pick = pick
        measured = [(role, pick(rates)) for _, role, rates in workers if _is_measured(pick(rates))]
        everybody = _mean([values for _, values in measured]) or pick(PRIOR)
        self._typical = {role: _mean([v for r, v in measured if r is role]) or everybody for role in Role}

    def of(self, worker: _Known) -> _Quantity:
        _, role, rates = worker
        own = self._pick(rates)
        return own if _is_measured(own) else self._typical[role]


class _StepFiller:
    """The line of decode steps.  Who has seen steps of one size alone knows their time and not what one sequence more
    would add: where that were taken for nothing, such a worker would get all that comes."""

    def __init__(self, workers: Sequence[_Known]) -> None:
        self._line = _Filler(workers, lambda r: (r.step_base_s, r.step_per_sequence_s))
        self._slope = _Filler(workers, lambda r: (r.step_per_sequence_s,))

    def of(self, worker: _Known) -> _Quantity:
        base_s, each_s = self._line.of(worker)
        if each_s == 0:
            (each_s,) = self._slope.of(worker)
            base_s = max(0.0, base_s - each_s)  # its steps were of one sequence at least
        return base_s, each_s


def _is_measured(values: _Quantity) -> bool:
    return all(0 <= value < inf for value in values) and any(values)


def _mean(rows: Sequence[_Quantity]) -> _Quantity:
    return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))
