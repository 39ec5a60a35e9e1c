"""Who gets a request, and why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gateway.routing import Candidate, NoWorkerError, Role, WorkerKey, choose_route


def worker(name: str, role: Role, **changes: object) -> Candidate:
    base = Candidate(
        key=WorkerKey(name, 1), role=role, address="a:1", content_fingerprint="f", block_size=16, num_requests=0,
        num_queued_prefill_tokens=0, num_free_blocks=1000, num_prefix_blocks=0, prefill_tokens_per_s=0.0,
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


P0, P1 = worker("p0", Role.PREFILL), worker("p1", Role.PREFILL)
D0, D1 = worker("d0", Role.DECODE), worker("d1", Role.DECODE)


def names(
    candidates: list[Candidate], num_tokens: int = 500, excluded: tuple[Candidate, ...] = ()
) -> tuple[str, str | None]:
    route = choose_route(candidates, num_tokens, frozenset(c.key for c in excluded), 32)
    assert route.reason
    return route.decode.key.worker_id, route.prefill.key.worker_id if route.prefill else None


def test_equal_views_give_equal_routes() -> None:
    assert names([P1, P0, D1, D0]) == names([D0, D1, P0, P1]) == ("d0", "p0")


def test_the_least_loaded_decode_worker_is_taken() -> None:
    assert names([P0, replace(D0, num_requests=3), D1]) == ("d1", "p0")


def test_among_equals_the_one_that_holds_the_prefix() -> None:
    assert names([P0, D0, replace(D1, num_prefix_blocks=4)]) == ("d1", "p0")


def test_a_full_pool_comes_last() -> None:
    assert names([P0, replace(D0, num_free_blocks=3), replace(D1, num_requests=9)]) == ("d1", "p0")


def test_the_prefill_worker_that_is_done_first() -> None:
    busy = replace(P0, num_queued_prefill_tokens=4000, prefill_tokens_per_s=1000.0)
    slow = replace(P1, prefill_tokens_per_s=400.0)
    assert names([busy, slow, D0]) == ("d0", "p1")
    assert names([replace(busy, num_queued_prefill_tokens=100), slow, D0]) == ("d0", "p0")


def test_a_short_rest_is_computed_where_it_is_decoded() -> None:
    assert names([P0, D0], num_tokens=31) == ("d0", None)
    assert names([P0, D0], num_tokens=32) == ("d0", "p0")
    assert names([P0, replace(D0, num_prefix_blocks=31)], num_tokens=500) == ("d0", None)


def test_unequal_content_is_never_paired() -> None:
    assert names([replace(P0, content_fingerprint="other"), P1, D0]) == ("d0", "p1")
    assert names([replace(P0, content_fingerprint="other"), D0]) == ("d0", None)


def test_unequal_block_sizes_are_paired_and_counted_each_in_its_own() -> None:
    assert names([replace(P0, block_size=32), D0]) == ("d0", "p0")
    # 15 blocks of 32 tokens leave 20 of the prompt, 15 of 16 leave 260.
    assert names([P0, replace(D0, block_size=32, num_prefix_blocks=15)], num_tokens=500) == ("d0", None)
    assert names([P0, replace(D0, num_prefix_blocks=15)], num_tokens=500) == ("d0", "p0")
    rates = {"prefill_tokens_per_s": 100.0, "num_prefix_blocks": 10}
    assert names([replace(P0, **rates), replace(P1, block_size=32, **rates), D0]) == ("d0", "p1")  # type: ignore[arg-type]


def test_failed_workers_are_left_out() -> None:
    assert names([P0, P1, D0], excluded=(P0,)) == ("d0", "p1")
    assert names([P0, D0], excluded=(P0,)) == ("d0", None)
    with pytest.raises(NoWorkerError, match="1 known"):
        names([P0, D0], excluded=(D0,))
    with pytest.raises(NoWorkerError, match="has joined"):
        names([P0])


def test_a_new_incarnation_is_another_worker() -> None:
    assert names([P0, replace(D0, key=WorkerKey("d0", 2))], excluded=(D0,)) == ("d0", "p0")
