"""What is expected to be taken, against a count step by step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.engine.growth import FIRST_GUESS_TOKENS, AnswerLengths, Growing, peak_growth

BLOCK = 4


def stepped(sequences: list[Growing]) -> int:
    """All draw a token a step; whoever has its last gives everything back before the next."""
    most = held = sum(g.num_blocks for g in sequences)
    for step in range(max((g.num_to_come for g in sequences), default=0) + 1):
        there = [g for g in sequences if g.num_to_come >= step]
        most = max(most, sum(max(g.num_blocks, -(-(g.num_tokens + step) // BLOCK)) for g in there))
    return most - held


growing = st.builds(Growing, st.integers(0, 6), st.integers(0, 30), st.integers(0, 40))


@given(st.lists(growing, max_size=12))
def test_the_peak_is_that_of_a_count_step_by_step(sequences: list[Growing]) -> None:
    assert peak_growth(sequences, BLOCK) == stepped(sequences)


@given(st.lists(growing, min_size=30, max_size=60))
def test_of_many_it_is_no_more_and_little_less(sequences: list[Growing]) -> None:
    found, exact = peak_growth(sequences, BLOCK), stepped(sequences)
    assert exact * 0.8 - len(sequences) // 4 <= found <= exact


def test_what_ends_makes_room_for_what_goes_on() -> None:
    """Sixteen tokens more for one of them, when the other's five blocks have come back: nobody grows by more than those."""
    assert peak_growth([Growing(5, 20, 0), Growing(1, 4, 16)], BLOCK) == 0
    assert peak_growth([Growing(5, 20, 8), Growing(1, 4, 16)], BLOCK) == 4


def test_an_answer_is_expected_to_end_where_those_did_that_got_as_far() -> None:
    lengths = AnswerLengths()
    assert lengths.expected(0, 1000) == FIRST_GUESS_TOKENS
    assert lengths.expected(0, 10) == 10
    assert lengths.expected(50, 1000) == 100
    for length in (10, 20, 60):
        lengths.ended(length)
    assert [lengths.expected(n, 1000) for n in (0, 9, 10, 20, 59, 60)] == [30, 30, 40, 60, 60, 120]
    assert lengths.expected(20, 45) == 45


def test_what_ended_long_ago_does_not_count() -> None:
    lengths = AnswerLengths()
    for length in [1000] * 50 + [8] * 200:
        lengths.ended(length)
    assert lengths.expected(0, 1000) == 8
