"""What an attempt on a decode worker counts as, there and on its prefill worker."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gateway.candidates import Candidate, Role, WorkerKey
from gateway.costs import Demand
from gateway.decoding import Decoding
from gateway.pending import PendingBook
from kvferry.api.worker.v1 import worker_pb2

DECODE, PREFILL = WorkerKey("d", 1), WorkerKey("p", 1)
TICKET = worker_pb2.DecodeEvent(ticket=worker_pb2.Ticket(transfer_id="t"))


class Link:
    def open(self, request: worker_pb2.DecodeOpen, decoding: Decoding) -> int:
        return 1

    def cancel(self, handle: int) -> None:
        pass


def candidate(key: WorkerKey, role: Role) -> Candidate:
    return Candidate(
        key=key, role=role, address="", content_fingerprint="x", block_size=16, block_nbytes=1, num_requests=0,
        num_queued_prefill_tokens=0, num_free_blocks=9, num_prefix_blocks=0,
    )  # fmt: skip


def decoding(book: PendingBook, *, is_held: bool) -> Decoding:
    route = SimpleNamespace(
        decode=candidate(DECODE, Role.DECODE), prefill=candidate(PREFILL, Role.PREFILL), num_uncached_tokens=100,
        demand=Demand(100, 9),
    )  # fmt: skip
    run: Any = SimpleNamespace(route=route, is_held=is_held, put=lambda event: None)
    link: Any = Link()
    return Decoding(run, 1, link, book, 60.0, set())


@pytest.mark.parametrize("is_held", [False, True])
async def test_a_promise_is_kept_until_the_prefill_worker_is_asked_but_not_for_a_client_that_does_not_read(
    is_held: bool,
) -> None:
    book = PendingBook(lambda: 0.0)
    attempt = decoding(book, is_held=is_held)
    attempt.open(worker_pb2.DecodeOpen())
    assert book.of(PREFILL).prefill_tokens == 100
    attempt.on_event("ticket", TICKET)
    assert book.of(PREFILL).prefill_tokens == (0 if is_held else 100)
    for _ in range(2):
        attempt.keep_promise()
        assert book.of(PREFILL).prefill_tokens == 0
    attempt.cancel()
    assert book.of(DECODE).num_requests == book.of(PREFILL).num_requests == 0
