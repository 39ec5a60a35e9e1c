"""What a tenant may use."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.quotas import UNLIMITED, Quota, QuotaBook
from kvferry.errors import OverloadedError

REQUESTS = st.tuples(
    st.floats(0, 5),  # seconds since the one before
    st.integers(1, 50),  # tokens of the prompt
    st.integers(0, 50),  # and of the answer
)


def refused_for_s(book: QuotaBook, quota: Quota, num_prompt_tokens: int, now_s: float) -> float:
    """0 for one that is let in."""
    try:
        book.begin("a", quota, num_prompt_tokens, now_s)
    except OverloadedError as error:
        return error.retry_after_s or -1.0
    return 0.0


@given(
    arrivals=st.lists(REQUESTS, max_size=80),
    per_minute=st.integers(1, 30),
    tokens_per_minute=st.integers(60, 600),
)
def test_no_minute_has_more_than_two_minutes_worth(
    arrivals: list[tuple[float, int, int]], per_minute: int, tokens_per_minute: int
) -> None:
    """One that was saved up and one that came meanwhile; of tokens, the last answer besides."""
    book, now_s = QuotaBook(), 1000.0
    begun: list[tuple[float, int]] = []
    for gap_s, prompt, answer in arrivals:
        now_s += gap_s
        if refused_for_s(book, Quota(per_minute, tokens_per_minute), prompt, now_s) == 0:
            book.end("a", answer)
            begun.append((now_s, prompt + answer))
    for start_s, _ in begun:
        minute = [tokens for at_s, tokens in begun if start_s <= at_s < start_s + 60]
        assert len(minute) <= 2 * per_minute
        assert sum(minute) <= 2 * tokens_per_minute + 100


@given(arrivals=st.lists(REQUESTS, max_size=40), tokens_per_minute=st.integers(60, 600))
def test_who_comes_again_when_told_is_let_in(arrivals: list[tuple[float, int, int]], tokens_per_minute: int) -> None:
    book, now_s, quota = QuotaBook(), 0.0, Quota(10, tokens_per_minute)
    for gap_s, prompt, answer in arrivals:
        now_s += gap_s
        for _ in range(3):  # each bucket may have its say
            if not (wait_s := refused_for_s(book, quota, prompt, now_s)):
                book.end("a", answer)
                break
            assert wait_s > 0
            now_s += wait_s + 1e-6
        else:
            pytest.fail("refused though it came when it was told to")


def test_streams_are_counted_while_they_last() -> None:
    book, quota = QuotaBook(), Quota(max_streams=2)
    book.begin("a", quota, 1, 0.0)
    book.begin("a", quota, 1, 0.0)
    with pytest.raises(OverloadedError, match="2 requests at a time") as caught:
        book.begin("a", quota, 1, 0.0)
    assert caught.value.reason == "QUOTA_EXCEEDED"
    book.begin("b", quota, 1, 0.0)
    book.end("a", 5)
    book.begin("a", quota, 1, 0.0)


def test_a_refused_request_costs_nothing() -> None:
    book, quota = QuotaBook(), Quota(requests_per_minute=2, tokens_per_minute=100)
    book.begin("a", quota, 60, 0.0)
    with pytest.raises(OverloadedError, match="100 tokens a minute") as caught:
        book.begin("a", quota, 60, 0.0)
    assert caught.value.retry_after_s == pytest.approx(12)
    book.begin("a", quota, 40, 0.0)


def test_a_prompt_larger_than_a_minutes_tokens_goes_when_the_account_is_full() -> None:
    book, quota = QuotaBook(), Quota(tokens_per_minute=100)
    book.begin("a", quota, 300, 0.0)
    with pytest.raises(OverloadedError) as caught:
        book.begin("a", quota, 300, 0.0)
    assert caught.value.retry_after_s == pytest.approx(180)
    book.begin("a", quota, 300, 180.0)


def test_a_changed_quota_holds_for_what_was_used_before() -> None:
    book = QuotaBook()
    book.begin("a", Quota(requests_per_minute=5), 1, 0.0)
    with pytest.raises(OverloadedError):
        [book.begin("a", Quota(requests_per_minute=1), 1, 0.0) for _ in range(2)]
    book.begin("a", UNLIMITED, 1, 0.0)
    book.end("a", 10**9)
    assert Quota() == UNLIMITED == Quota(inf, inf, inf)
