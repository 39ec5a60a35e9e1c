"""Which workers serve a request.  Pure: a view of the cluster in, a choice and its reasons out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from enum import Enum
from random import Random

from gateway.apart import Pair
from gateway.candidates import Candidate, Role, WorkerKey
from gateway.costs import STALL_WEIGHT, Costs, Demand, Option, num_reckoned_steps
from gateway.pairing import Partners, why_not_pair
from services.runtime.protocol import SPOKEN, Protocol


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
    """``options``, the best first: all that keep the chosen decode worker, the best of every other one, and the best by
    which another one computes the prompt itself.  The chosen one is among them.  ``pull_reason``: why it reads cached
    blocks from another worker first or does not, where there are any."""

    policy: Policy
    demand: Demand
    chosen: Option
    options: tuple[Option, ...]
    passed_over: tuple[PassedOver, ...]
    pull_reason: str = ""

    def by(self, option: Option) -> Route:
        """Another of its options."""
        return replace(self, chosen=option, pull_reason="")

    @property
    def decode(self) -> Candidate:
        return self.chosen.decode

    @property
    def prefill(self) -> Candidate | None:
        """None: the decode worker computes the prompt itself."""
        return self.chosen.prefill

    @property
    def step_s(self) -> float:
        """A step of the decode worker's with this request in the batch."""
        return self.chosen.terms.decode_s / num_reckoned_steps(self.demand)

    @property
    def num_uncached_tokens(self) -> int:
        """Prompt tokens that whoever computes the prompt neither has nor pulls."""
        worker, pull = self.prefill or self.decode, self.chosen.pull
        if pull is not None:
            return self.demand.num_prompt_tokens - pull.total_blocks * worker.block_size
        return worker.num_uncached(self.demand.num_prompt_tokens)

    @property
    def reason(self) -> str:
        where = self.decode.key.worker_id
        what = f"prefill on {self.prefill.key.worker_id}, decode on {where}" if self.prefill else f"all on {where}"
        t = self.chosen.terms
        pull = f"; {self.pull_reason}" if self.pull_reason else ""
        return (
            f"{what}, by {self.policy.value} of {len(self.options)} options: about {t.total_s:.3f} s = "
            f"queue {t.queue_s:.3f} + pull {t.pull_s:.3f} + prefill {t.prefill_s:.3f} + ship {t.ship_s:.3f} + "
            f"stall {t.stall_s:.3f} + evict {t.evict_s:.3f} + decode {t.decode_s:.3f}{pull}"
        )


class NoWorkerError(Exception):
    """No decode worker can take the request."""

    def __init__(self, message: str, passed_over: tuple[PassedOver, ...]) -> None:
        super().__init__(message)
        self.passed_over = passed_over


def choose_route(
    candidates: Sequence[Candidate], demand: Demand, excluded: frozenset[WorkerKey] = frozenset(), *,
    policy: Policy = Policy.KV_AWARE, min_ship_tokens: int = 0, stall_weight: float = STALL_WEIGHT, turn: int = 0,
    request_id: str = "", spoken: Protocol = SPOKEN, apart: Set[Pair] = frozenset(),
) -> Route:  # fmt: skip
    """Equal arguments give equal routes, in whatever order the candidates come; equal costs go to the decode worker with
    fewer requests, then to the lowest worker ids.  A decode worker whose pool is full comes after all others.

    For kv-aware, whether to ship is the costs' business; a prompt of which the decode worker lacks fewer than
    ``min_ship_tokens`` is computed there under the other policies only, which know no costs.  ``stall_weight``: what a
    second counts that running streams lose to a prompt, where a prefill worker could spare them.  ``turn`` counts the
    choices for round-robin, ``request_id`` is random's seed, ``spoken`` are the gateway's protocols.  Pairs of
    ``apart`` are not made.  Raises NoWorkerError."""
    refused = {c.key: why for c in candidates if (why := _why_not(c, excluded, spoken))}
    usable = sorted((c for c in candidates if c.key not in refused), key=lambda c: c.key.worker_id)
    decoders = [c for c in usable if c.role is Role.DECODE]
    if not decoders:
        known = sum(c.role is Role.DECODE for c in candidates)
        raise NoWorkerError(
            f"no decode worker can take the request ({known} known, all failed it, are draining or speak another "
            "protocol)" if known else "no decode worker has joined the cluster",
            _told(refused),
        )  # fmt: skip
    writers = [c for c in usable if c.role is Role.PREFILL]
    partners = Partners(writers, apart)
    can_be_spared = any(partners.of(d) for d in decoders)
    weight = stall_weight if can_be_spared else None
    costs = Costs(usable, demand, pulls=policy is Policy.KV_AWARE, stall_weight=weight)
    soonest = Partners(costs.soonest_first(writers), apart)
    alones = [costs.alone(d) for d in decoders]
    bests = [costs.best(alone, soonest.of(alone.decode)) for alone in alones]
    if policy is Policy.KV_AWARE:
        chosen = min(bests, key=lambda option: option.rank)
    else:
        chosen = _Custom(policy, turn, Random(request_id)).choose(decoders, partners, costs, demand, min_ship_tokens)
    here = next(alone for alone in alones if alone.decode is chosen.decode)
    with_it = [here, *(costs.split(chosen.decode, w) for w in partners.of(chosen.decode))]
    others = [best for best in bests if best.decode is not chosen.decode]
    there = min((alone for alone in alones if alone is not here), key=lambda option: option.rank, default=None)
    if there is not None and all(there is not other for other in others):
        others.append(there)
    options = tuple(sorted([*with_it, *others], key=lambda option: option.rank))
    refused |= {w.key: why for w in writers if (why := why_not_pair(w, chosen.decode))}
    where = chosen.decode.key
    refused |= {w.key: f"could not reach {where.worker_id} a moment ago" for w in writers if (w.key, where) in apart}
    return Route(policy, demand, chosen, options, _told(refused), costs.explain_pull(chosen))


def _why_not(worker: Candidate, excluded: frozenset[WorkerKey], spoken: Protocol) -> str:
    """Why the worker serves no part of the request, wherever the others are; empty where it may."""
    if worker.key in excluded:
        return "failed this request"
    if worker.draining:
        return "draining"
    if not worker.abilities.protocol.overlaps(spoken):
        return f"speaks protocol {worker.abilities.protocol}, this gateway {spoken}"
    return ""


def _told(refused: Mapping[WorkerKey, str]) -> tuple[PassedOver, ...]:
    return tuple(sorted((PassedOver(key.worker_id, why) for key, why in refused.items()), key=lambda p: p.worker_id))


@dataclass(slots=True)
class _Custom:
    """A policy that does not look at costs."""

    policy: Policy
    turn: int
    random: Random

    def choose(
        self, decoders: Sequence[Candidate], partners: Partners, costs: Costs, demand: Demand,
        min_ship_tokens: int,
    ) -> Option:  # fmt: skip
        decode = self._pick([d for d in decoders if not costs.is_full(d)] or decoders)
        able = partners.of(decode)
        lacking = demand.num_prompt_tokens - decode.num_prefix_blocks * decode.block_size
        return costs.split(decode, self._pick(able)) if able and lacking >= min_ship_tokens else costs.alone(decode)

    def _pick(self, ordered: Sequence[Candidate]) -> Candidate:
        """``ordered``: of one role, by worker id."""
        match self.policy:
            case Policy.ROUND_ROBIN:
                return ordered[self.turn % len(ordered)]
            case Policy.RANDOM:
                return self.random.choice(ordered)
            case _:
                return min(ordered, key=_load)


def _load(worker: Candidate) -> tuple[int, int, str]:
    # A decode worker's queue of prompts is short or empty, and its requests last.
    first, second = worker.num_queued_prefill_tokens, worker.num_requests
    if worker.role is Role.DECODE:
        first, second = second, first
    return (first, second, worker.key.worker_id)
