"""What the gateway counts as under way on a worker."""

from __future__ import annotations

from gateway.candidates import WorkerKey
from gateway.pending import FLIGHT_S, STALE_S, Pending, PendingBook

KEY = WorkerKey("d0", 1)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_prompt_counts_until_it_is_computed_and_its_request_until_it_ends() -> None:
    book = PendingBook(Clock())
    first, second = book.add(KEY, 100), book.add(KEY, 30)
    assert book.of(KEY) == Pending(2, 130)
    book.computed(KEY, first)
    assert book.of(KEY) == Pending(2, 30)
    book.remove(KEY, first)
    assert book.of(KEY) == Pending(1, 30)
    book.remove(KEY, second)
    assert book.of(KEY) == Pending(0, 0)


def test_blocks_count_until_the_worker_has_reported_what_began() -> None:
    """What it reported before does not have them."""
    book = PendingBook(Clock())
    first, second = book.add(KEY, 0, 7), book.add(KEY, 0, 5)
    book.reported(KEY)
    assert book.of(KEY) == Pending(2, 0, 12)
    book.computed(KEY, first)
    assert book.of(KEY) == Pending(2, 0, 12)
    for _ in range(2):
        book.reported(KEY)
        assert book.of(KEY) == Pending(2, 0, 5)
    book.computed(KEY, second)
    book.remove(KEY, second)
    assert book.of(KEY) == Pending(1)
    book.reported(KEY)
    assert book.of(KEY) == Pending(1)
    book.remove(KEY, first)
    book.reported(KEY)
    assert book.of(KEY) == Pending()


def test_what_others_have_there_is_what_was_there_beyond_ones_own_at_the_last_report() -> None:
    clock = Clock()
    book = PendingBook(clock)
    assert book.there(KEY, 3, 500) == Pending(3, 500)
    mine = book.add(KEY, 100, 7)
    assert book.there(KEY, 3, 500) == Pending(4, 600, 7), "the worker has not reported it yet"
    book.reported(KEY)
    assert book.there(KEY, 4, 560) == Pending(4, 560, 7)
    book.computed(KEY, mine)
    assert book.there(KEY, 4, 560) == Pending(4, 460, 7), "nobody waits for what was computed since"
    book.remove(KEY, mine)
    assert book.there(KEY, 4, 560) == Pending(3, 460)
    clock.now_s += 2 * FLIGHT_S
    book.reported(KEY)
    assert book.there(KEY, 3, 500) == Pending(3, 500)


def test_that_a_worker_has_begun_less_than_was_sent_does_not_make_others_of_it() -> None:
    book = PendingBook(Clock())
    book.add(KEY, 100)
    book.reported(KEY)
    assert book.there(KEY, 0, 0) == Pending(1, 100)
    book.gone(KEY)
    assert book.there(KEY, 1, 30) == Pending(2, 130)


def test_what_ended_while_a_report_was_under_way_is_nobody_elses() -> None:
    for late_s, others in ((FLIGHT_S / 2, 0), (2 * FLIGHT_S, 1)):
        clock = Clock()
        book = PendingBook(clock)
        book.reported(KEY)
        mine = book.add(KEY, 100)
        clock.now_s += 1
        book.computed(KEY, mine)
        book.remove(KEY, mine)
        clock.now_s += late_s
        book.reported(KEY)
        assert book.there(KEY, 1, 100) == Pending(others, 100 * others)


def test_nobody_waits_for_what_a_worker_had_before_it_fell_silent() -> None:
    clock = Clock()
    book = PendingBook(clock)
    book.reported(KEY)
    book.add(KEY, 100)
    clock.now_s += STALE_S
    assert book.there(KEY, 3, 500) == Pending(4, 600)
    clock.now_s += 0.1
    assert book.there(KEY, 3, 500) == Pending(1, 100)


def test_whoever_waits_hears_of_less() -> None:
    heard: list[int] = []
    book = PendingBook(Clock(), lambda: heard.append(book.of(KEY).num_blocks))
    first, second = book.add(KEY, 0, 7), book.add(KEY, 0, 5)
    book.computed(KEY, first)
    book.remove(KEY, first)
    book.remove(KEY, second)
    assert heard == [12, 5, 0]
