"""What the workers of a running cluster computed between two looks, as sums that costs are fitted to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import add, sub

from kvferry.errors import InvalidRequestError
from kvferry.types import Cluster, StepSums, Worker

Key = tuple[str, int]  # worker, incarnation


def workers_of(cluster: Cluster, named: Sequence[str]) -> list[Worker]:
    """Of the cluster's model, and of ``named``, if any.  Raises InvalidRequestError where one is not there."""
    workers = [w for w in cluster.workers if w.model.revision == cluster.model.revision]
    if missing := [name for name in named if name not in {w.worker_id for w in workers}]:
        there = ", ".join(w.worker_id for w in workers)
        raise InvalidRequestError(
            f"there is no worker {missing[0]} of {cluster.model.name}; the gateway knows: {there}"
        )
    return [w for w in workers if w.worker_id in named or not named]


def sums_of(workers: Sequence[Worker]) -> dict[Key, StepSums]:
    return {(w.worker_id, w.incarnation): w.step_sums for w in workers if w.step_sums is not None}


def between(before: dict[Key, StepSums], after: dict[Key, StepSums]) -> StepSums | None:
    """All workers together.  Of one that came meanwhile all counts, of one that went nothing.  None: no step."""
    total: StepSums | None = None
    for key, sums in after.items():
        if not sums.shares:
            continue  # it has not computed a step yet
        earlier = before.get(key)
        made = _combined(sub, sums, earlier) if earlier is not None and earlier.shares else sums
        total = made if total is None else _combined(add, total, made)
    return total if total is not None and total.shares[0] else None


def _combined(operation: Callable[[float, float], float], one: StepSums, other: StepSums) -> StepSums:
    shares, ratios, products, scatter = (
        tuple(map(operation, mine, theirs))
        for mine, theirs in (
            (one.shares, other.shares), (one.ratios, other.ratios), (one.products, other.products),
            (one.scatter, other.scatter),
        )
    )  # fmt: skip
    return StepSums(
        operation(one.seconds, other.seconds), shares, ratios, products, scatter, operation(one.squares, other.squares)
    )
