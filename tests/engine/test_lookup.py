from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from services.engine.lookup import LENGTHS, MAX_DRAFTS, Drafter, share_out

LETTERS = st.lists(st.integers(0, 3), min_size=1, max_size=60)


def naive(tokens: list[int], count: int) -> list[int]:
    """What followed the longest n-gram when it occurred last before, going round where the text ends."""
    for length in LENGTHS:
        for begin in range(len(tokens) - 1, length - 1, -1):
            if tokens[begin - length : begin] == tokens[-length:]:
                text = list(tokens)
                for i in range(count):
                    text.append(text[begin + i])
                return text[len(tokens) :]
    return []


@given(tokens=LETTERS, cuts=st.lists(st.integers(1, 60), max_size=8), most=st.integers(0, 4))
def test_drafts_are_what_followed_the_longest_match(tokens: list[int], cuts: list[int], most: int) -> None:
    """However many tokens came between two proposals."""
    drafter = Drafter()
    for end in sorted({min(cut, len(tokens)) for cut in cuts} | {len(tokens)}):
        assert drafter.propose(tokens[:end], most) == naive(tokens[:end], min(most, 3))


def test_a_quotation_is_drafted_further_with_each_success() -> None:
    tokens = [*range(100), 0, 1, 2]
    drafter, sizes = Drafter(), []
    while tokens[-1] < 60:
        drafts = drafter.propose(tokens, 99)
        sizes.append(len(drafts))
        assert drafts == list(range(tokens[-1] + 1, tokens[-1] + 1 + len(drafts)))
        tokens += [*drafts, drafts[-1] + 1]
        drafter.learn(len(tokens), len(drafts), len(drafts))
    assert sizes[:3] == [3, 6, MAX_DRAFTS]
    assert set(sizes[3:]) == {MAX_DRAFTS}


def test_failures_silence_it_for_longer_and_longer() -> None:
    tokens, drafter, asked = [7] * 10, Drafter(), []
    while len(tokens) < 400:
        if drafts := drafter.propose(tokens, 99):
            asked.append(len(tokens))
            drafter.learn(len(tokens) + 1, len(drafts), 0)
        tokens.append(7)
    gaps = [b - a for a, b in itertools.pairwise(asked)]
    assert gaps[:5] == [1, 9, 17, 33, 65]
    assert set(gaps[4:]) == {65}


def test_half_a_success_asks_for_as_much() -> None:
    drafter = Drafter()
    drafter.learn(10, 6, 4)
    assert len(drafter.propose([5] * 20, 99)) == 4


@given(wanted=st.lists(st.integers(0, 12), max_size=10), room=st.integers(-2, 40))
def test_room_is_shared_in_turns(wanted: list[int], room: int) -> None:
    given_ = share_out(wanted, room)
    assert sum(given_) == min(sum(wanted), max(room, 0))
    for most, got in zip(wanted, given_, strict=True):
        assert 0 <= got <= most
        assert got == most or got >= max(given_) - 1, "nobody goes short while another has two more"
