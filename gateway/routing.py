"""Which workers serve a request.  Pure: a view of the cluster in, a choice and its reasons out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random

from gateway.candidates import Candidate, Role, WorkerKey
from gateway.costs import Costs, Demand, Option


class Policy(Enum):
    """``KV_AWARE`` takes the cheapest option of all; the others are there to compare it with.  They look at no cache, and
    ship every prompt of which the decode worker lacks enough."""

    KV_AWARE = "kv-aware"
    LEAST_LOADED = "least-loaded"
    ROUND_ROBIN = "round-robin"
    RANDOM = "random"


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A worker that could not be chosen, and why."""

    worker_id: str
    why: str


@dataclass(frozen=True, slots=True)
class Route:
    """``options``, the best first: all that keep the chosen decode worker, and the best of every other one.  The chosen
    one is among them."""

    policy: Policy
    demand: Demand
    chosen: Option
    options: tuple[Option, ...]
    passed_over: tuple[PassedOver, ...]

    @property
    def decode(self) -> Candidate:
        return self.chosen.decode

    @property
    def prefill(self) -> Candidate | None:
        """None: the decode worker computes the prompt itself."""
        return self.chosen.prefill

    @property
    def num_uncached_tokens(self) -> int:
        """Prompt tokens that whoever computes the prompt does not have."""
        return (self.prefill or self.decode).num_uncached(self.demand.num_prompt_tokens)

    @property
    def reason(self) -> str:
        where = self.decode.key.worker_id
        what = f"prefill on {self.prefill.key.worker_id}, decode on {where}" if self.prefill else f"all on {where}"
        t = self.chosen.terms
        return (
            f"{what}, by {self.policy.value} of {len(self.options)} options: about {t.total_s:.3f} s = "
            f"queue {t.queue_s:.3f} + prefill {t.prefill_s:.3f} + ship {t.ship_s:.3f} + stall {t.stall_s:.3f} + "
            f"decode {t.decode_s:.3f}"
        )


class NoWorkerError(Exception):
    """No decode worker can take the request."""

    def __init__(self, message: str, passed_over: tuple[PassedOver, ...]) -> None:
        super().__init__(message)
        self.passed_over = passed_over


def choose_route(
    candidates: Sequence[Candidate], demand: Demand, excluded: frozenset[WorkerKey] = frozenset(), *,
    policy: Policy = Policy.KV_AWARE, min_ship_tokens: int = 0, turn: int = 0, request_id: str = "",
) -> Route:  # fmt: skip
    """Equal arguments give equal routes, in whatever order the candidates come; equal costs go to the decode worker with
    fewer requests, then to the lowest worker ids.  A decode worker whose pool is full comes after all others.

    For kv-aware, whether to ship is the costs' business; a prompt of which the decode worker lacks fewer than
    ``min_ship_tokens`` is computed there under the other policies only, which know no costs.  ``turn`` counts the requests
    for round-robin, ``request_id`` is random's seed.  Raises NoWorkerError."""
    passed_over = tuple(sorted(_passed_over(candidates, excluded), key=lambda p: p.worker_id))
    usable = sorted((c for c in candidates if c.key not in excluded and not c.draining), key=lambda c: c.key.worker_id)
    decoders = [c for c in usable if c.role is Role.DECODE]
    if not decoders:
        known = sum(c.role is Role.DECODE for c in candidates)
        raise NoWorkerError(
            f"no decode worker can take the request ({known} known, all failed it or are draining)" if known else
            "no decode worker has joined the cluster", passed_over,
        )  # fmt: skip
    costs = Costs(usable, demand)
    by_decoder = {d.key: _options(costs, d, usable) for d in decoders}
    if policy is Policy.KV_AWARE:
        chosen = min((option for options in by_decoder.values() for option in options), key=lambda o: o.rank)
    else:
        chosen = _by_custom(_Custom(policy, turn, Random(request_id)), by_decoder, costs, demand, min_ship_tokens)
    others = [min(options, key=lambda o: o.rank) for key, options in by_decoder.items() if key != chosen.decode.key]
    kept = sorted([*by_decoder[chosen.decode.key], *others], key=lambda o: o.rank)
    return Route(policy, demand, chosen, tuple(kept), passed_over)


def _options(costs: Costs, decode: Candidate, usable: Sequence[Candidate]) -> list[Option]:
    """Alone first, then with each prefill worker that can write here."""
    writers = [
        c for c in usable if c.role is Role.PREFILL and c.content_fingerprint == decode.content_fingerprint
    ]  # fmt: skip
    return [costs.alone(decode), *(costs.split(decode, writer) for writer in writers)]


def _passed_over(candidates: Sequence[Candidate], excluded: frozenset[WorkerKey]) -> list[PassedOver]:
    contents = {c.content_fingerprint for c in candidates if c.role is Role.DECODE}
    found = []
    for c in candidates:
        if c.key in excluded:
            found.append(PassedOver(c.key.worker_id, "failed this request"))
        elif c.draining:
            found.append(PassedOver(c.key.worker_id, "draining"))
        elif c.role is Role.PREFILL and c.content_fingerprint not in contents:
            found.append(PassedOver(c.key.worker_id, "its KV fits no decode worker"))
    return found


@dataclass(slots=True)
class _Custom:
    """How a policy picks without looking at costs."""

    policy: Policy
    turn: int
    random: Random

    def pick(self, ordered: Sequence[Candidate]) -> Candidate:
        """``ordered`` by worker id."""
        match self.policy:
            case Policy.ROUND_ROBIN:
                return ordered[self.turn % len(ordered)]
            case Policy.RANDOM:
                return self.random.choice(ordered)
            case _:
                return min(ordered, key=lambda c: (c.num_queued_prefill_tokens, c.num_requests, c.key.worker_id)
                           if c.role is Role.PREFILL else (c.num_requests, 0, c.key.worker_id))  # fmt: skip


def _by_custom(
    custom: _Custom, by_decoder: dict[WorkerKey, list[Option]], costs: Costs, demand: Demand, min_ship_tokens: int
) -> Option:
    decoders = [options[0].decode for options in by_decoder.values()]
    decode = custom.pick([d for d in decoders if not costs.is_full(d)] or decoders)
    alone, *splits = by_decoder[decode.key]
    lacking = demand.num_prompt_tokens - decode.num_prefix_blocks * decode.block_size
    writers = [option.prefill for option in splits if option.prefill]
    if not writers or lacking < min_ship_tokens:
        return alone
    writer = custom.pick(writers)
    return next(option for option in splits if option.prefill is writer)
