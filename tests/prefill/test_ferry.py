"""The writer's side of a ticket, in every order of events."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.prefill.ferry import CancelWrites, Commit, Ferry, FerryState, Stopped, Write

BLOCK = 4


def ferry(num_tokens: int, first: int = 0) -> Ferry:
    return Ferry(-(-num_tokens // BLOCK) - first, first, num_tokens, BLOCK)


@settings(max_examples=300)
@given(st.data())
def test_every_block_once_then_one_commit_or_one_stop(data: st.DataObject) -> None:
    num_tokens = data.draw(st.integers(1, 40))
    num_blocks = -(-num_tokens // BLOCK)
    first = data.draw(st.integers(0, num_blocks))
    f = ferry(num_tokens, first)
    written: list[int] = []
    actions: list[object] = []
    computed = data.draw(st.integers(0, num_tokens - 1))  # in blocks of ours, which may have another size
    outstanding = 0
    drawn = stopped_by_us = False

    def take(new: list[object]) -> None:
        nonlocal outstanding
        for action in new:
            if isinstance(action, Write):
                assert f.state is FerryState.WRITING
                outstanding += 1
                written.extend(range(action.first_token, action.end_token))
                assert action.end_token <= computed, "written before it was computed"
                assert action.first_token % BLOCK == 0, "a block is written in two goes"
                assert action.end_token % BLOCK == 0 or action.end_token == num_tokens
                assert action.num_blocks == -(-(action.end_token - action.first_token) // BLOCK) > 0
            if isinstance(action, Stopped | Commit):
                assert outstanding == 0, "said to be over while a write runs"
            actions.append(action)

    take(list(f.computed(computed)))
    for _ in range(60):
        choices = []
        if computed < num_tokens:
            choices.append("compute")
        elif not drawn:
            choices.append("draw")
        if outstanding:
            choices += ["written", "failed"]
        if not stopped_by_us and data.draw(st.integers(0, 9)) == 0:
            choices.append("stop")
        if not choices:
            break
        match data.draw(st.sampled_from(choices)):
            case "compute":
                computed = min(num_tokens, computed + data.draw(st.integers(1, 9)))
                take(list(f.computed(computed)))
            case "draw":
                drawn = True
                take(list(f.drawn()))
            case "written":
                outstanding -= 1
                take(list(f.written()))
            case "failed":
                outstanding -= 1
                take(list(f.write_failed("broken")))
            case "stop":
                stopped_by_us = True
                take(list(f.stop("asked")))
    ends = [a for a in actions if isinstance(a, Stopped | Commit)]
    asked = list(range(first * BLOCK, num_tokens))
    if f.state is FerryState.COMMITTING:
        assert written == asked
        assert ends == [Commit(num_blocks - first, len(asked))]
    else:
        assert written == asked[: len(written)]
        assert len(ends) <= 1 or isinstance(ends[-1], Stopped)


def test_a_chunk_travels_while_the_next_is_computed() -> None:
    f = ferry(10)
    assert f.computed(0) == []
    assert f.computed(5) == [Write(0, 4, 1)]
    assert f.computed(8) == [Write(4, 8, 1)]
    assert f.computed(10) == [Write(8, 10, 1)]
    assert f.drawn() == []
    assert f.written() == f.written() == []
    assert f.written() == [Commit(3, 10)]


def test_a_partial_prefix_hit_on_the_owners_side_shifts_nothing() -> None:
    f = ferry(10, first=2)
    assert f.computed(4) == []
    assert f.computed(10) == [Write(8, 10, 1)]


def test_a_prefix_hit_that_ends_inside_a_block_of_the_owners_waits_for_the_rest() -> None:
    f = ferry(14, first=1)
    assert f.computed(6) == []
    assert f.computed(9) == [Write(4, 8, 1)]
    assert f.computed(14) == [Write(8, 14, 2)]


def test_nothing_to_write_still_commits() -> None:
    f = ferry(8, first=2)
    f.computed(4)
    f.computed(8)
    assert f.drawn() == [Commit(0, 0)]


def test_stopping_waits_for_the_last_write() -> None:
    f = ferry(10)
    f.computed(8)
    assert f.stop("why") == [CancelWrites()]
    assert f.stop("again") == []
    assert f.computed(10) == f.drawn() == []
    assert f.write_failed("cancelled") == [Stopped("why")]


def test_a_refused_commit_stops() -> None:
    f = ferry(3)
    f.computed(3)
    f.drawn()
    f.written()
    assert f.state is FerryState.COMMITTING
    assert f.stop("refused") == [Stopped("refused")]


@pytest.mark.parametrize(("num_blocks", "first", "num_tokens"), [(2, 0, 12), (3, 1, 12), (4, 0, 12)])
def test_a_ticket_for_other_blocks_is_refused(num_blocks: int, first: int, num_tokens: int) -> None:
    with pytest.raises(ValueError, match="the ticket names blocks"):
        Ferry(num_blocks, first, num_tokens, BLOCK)
