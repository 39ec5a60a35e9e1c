"""The request's state machine: every token once, whatever comes in whichever order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.candidates import WorkerKey
from gateway.request import (
    MOST_ATTEMPTS,
    CancelAttempt,
    ChooseRoute,
    DecodeDone,
    Emit,
    Fail,
    Finish,
    NotRouted,
    OpenDecode,
    OpenPrefill,
    PrefillDone,
    RequestMachine,
    Routed,
    State,
    Stream,
    StreamFailed,
    TicketCame,
    TokenCame,
)
from kvferry.api.common.v1 import common_pb2
from kvferry.api.worker.v1 import worker_pb2
from kvferry.errors import (
    AbortedError,
    Error,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)

D, D2, P = WorkerKey("d", 1), WorkerKey("d2", 1), WorkerKey("p", 1)
TICKET, COMMITTED, FINISHED = worker_pb2.Ticket(), worker_pb2.Committed(), worker_pb2.DecodeFinished()


def token(index: int, id_: int | None = None) -> common_pb2.Token:
    return common_pb2.Token(index=index, id=100 + index if id_ is None else id_)


def decoded(index: int, attempt: int = 1, id_: int | None = None) -> TokenCame:
    return TokenCame(attempt, Stream.DECODE, token(index, id_))


def prefilled(attempt: int = 1, id_: int | None = None) -> TokenCame:
    return TokenCame(attempt, Stream.PREFILL, token(0, id_))


def split(max_attempts: int = 3, **options: Any) -> RequestMachine:
    machine = RequestMachine(max_attempts, **options)
    assert machine.start() == [ChooseRoute(frozenset())]
    assert machine.on(Routed(D, P)) == [OpenDecode(1)]
    assert machine.on(TicketCame(1, TICKET)) == [OpenPrefill(1, TICKET)]
    return machine


def failed(stream: Stream, error: Error, attempt: int = 1) -> StreamFailed:
    return StreamFailed(attempt, stream, error)


LOST = UnavailableError("gone")


def test_a_split_request_in_the_usual_order() -> None:
    m = split()
    assert m.on(prefilled()) == [Emit(token(0))]
    assert m.on(PrefillDone(1, COMMITTED)) == []
    assert m.on(decoded(0)) == []
    assert m.on(decoded(1)) == [Emit(token(1))]
    assert m.on(DecodeDone(1, FINISHED)) == [Finish(FINISHED)]
    assert m.state is State.ENDED


def test_the_decode_workers_first_token_may_overtake_the_prefill_workers() -> None:
    m = split()
    assert m.on(decoded(0)) == [Emit(token(0))]
    assert m.on(decoded(1)) == [Emit(token(1))]
    assert m.on(prefilled()) == []
    assert m.on(DecodeDone(1, FINISHED)) == [], "the writer's figures are still to come"
    assert m.on(PrefillDone(1, COMMITTED)) == [Finish(FINISHED)]


def test_a_first_token_leaves_when_its_answer_goes_on_where_that_is_asked() -> None:
    m = split(first_from_decode=True)
    assert m.on(prefilled()) == []
    assert m.on(PrefillDone(1, COMMITTED)) == []
    assert m.on(decoded(0)) == [Emit(token(0))]
    assert m.on(decoded(1)) == [Emit(token(1))]
    assert m.on(DecodeDone(1, FINISHED)) == [Finish(FINISHED)]


@pytest.mark.parametrize(("max_tokens", "stop_ids"), [(1, frozenset()), (9, frozenset({100}))])
def test_a_first_token_that_is_the_only_one_leaves_at_once(max_tokens: int, stop_ids: frozenset[int]) -> None:
    m = split(max_tokens=max_tokens, stop_ids=stop_ids, first_from_decode=True)
    assert m.on(prefilled()) == [Emit(token(0))]
    assert isinstance(m.on(failed(Stream.DECODE, LOST))[-1], Finish), "only the news of its end was lost"


def test_who_is_silent_behind_the_commit_is_the_decode_worker() -> None:
    m = split(first_from_decode=True)
    m.on(prefilled())
    m.on(PrefillDone(1, COMMITTED))
    silence = UnavailableError("said nothing", reason="STALLED")
    assert m.on(failed(Stream.DECODE, silence))[1] == ChooseRoute(frozenset({D}), 0)


def test_one_that_did_not_leave_is_drawn_again() -> None:
    m = split(first_from_decode=True)
    m.on(prefilled())
    assert m.on(failed(Stream.DECODE, LOST)) == [CancelAttempt(1), ChooseRoute(frozenset({D}), 0)]
    m.on(Routed(D2, P))
    assert m.on(decoded(0, attempt=2)) == [Emit(token(0))]


def test_a_request_on_one_worker() -> None:
    m = RequestMachine(3)
    m.start()
    assert m.on(Routed(D, None)) == [OpenDecode(1)]
    assert m.on(decoded(0)) == [Emit(token(0))]
    assert m.on(DecodeDone(1, FINISHED)) == [Finish(FINISHED)]


@pytest.mark.parametrize("first_token_was_sent", [False, True])
def test_a_lost_prefill_worker_starts_the_next_attempt_without_it(first_token_was_sent: bool) -> None:
    m = split()
    if first_token_was_sent:
        assert m.on(prefilled()) == [Emit(token(0))]
    sent = int(first_token_was_sent)
    assert m.on(failed(Stream.PREFILL, LOST)) == [CancelAttempt(1), ChooseRoute(frozenset({P}), sent)]
    assert m.on(decoded(0)) == [], "the attempt before is over"
    assert m.on(Routed(D, None)) == [OpenDecode(2)]
    assert m.on(decoded(0, attempt=2, id_=7)) == [Emit(token(sent, 7))]
    assert m.on(decoded(1, attempt=2, id_=8)) == [Emit(token(sent + 1, 8))]
    assert m.on(DecodeDone(2, FINISHED)) == [Finish(FINISHED)]


def test_what_a_writer_did_is_held_against_the_writer() -> None:
    m = split()
    assert m.on(failed(Stream.DECODE, AbortedError("the writer gave up")))[1] == ChooseRoute(frozenset({P}))
    m = split()
    assert m.on(failed(Stream.DECODE, OverloadedError("full")))[1] == ChooseRoute(frozenset({D}))


def test_while_a_writer_works_the_silence_of_its_decode_worker_is_the_writers() -> None:
    silence = UnavailableError("said nothing", reason="STALLED")
    assert split().on(failed(Stream.DECODE, silence))[1] == ChooseRoute(frozenset({P}))
    committed, without_ticket = split(), RequestMachine(3)
    committed.on(PrefillDone(1, COMMITTED))
    without_ticket.on(Routed(D, P))
    for m in (committed, without_ticket):
        assert m.on(failed(Stream.DECODE, silence))[1] == ChooseRoute(frozenset({D}))


def test_each_writer_that_the_decode_worker_distrusts_is_passed_over_and_no_attempt_is_used_up() -> None:
    """So that the prompt is computed where it is decoded at last, however many writers there are."""
    m = split(max_attempts=2)
    writers = [P]
    for attempt in range(1, 6):
        error = AbortedError("some arrived damaged", reason="PAIR_QUARANTINED")
        actions = m.on(failed(Stream.DECODE, error, attempt))
        assert actions == [CancelAttempt(attempt), ChooseRoute(frozenset(writers))]
        writers.append(WorkerKey(f"p{attempt}", 1))
        m.on(Routed(D, writers[-1]))
    damaged = AbortedError("blocks 3", reason="CHECKSUM_MISMATCH")
    assert m.on(failed(Stream.DECODE, damaged, 6))[1] == ChooseRoute(frozenset(writers))
    m.on(Routed(D, None))
    assert m.on(failed(Stream.DECODE, LOST, 7)) == [CancelAttempt(7), Fail(LOST)]


def test_a_writer_that_cannot_reach_its_owner_is_passed_over_and_no_attempt_is_used_up() -> None:
    """The way between the two may be all that is lost: then the decode worker serves with another writer, or alone."""
    m = split(max_attempts=2)
    unreachable = UnavailableError("the pool's owner was lost", reason="OWNER_LOST")
    assert m.on(failed(Stream.PREFILL, unreachable)) == [CancelAttempt(1), ChooseRoute(frozenset({P}))]
    m.on(Routed(D, None))
    assert m.on(failed(Stream.DECODE, LOST, 2)) == [CancelAttempt(2), ChooseRoute(frozenset({P, D}))]


def test_a_prefill_worker_lost_after_its_commit_does_not_matter() -> None:
    m = split()
    m.on(prefilled())
    m.on(decoded(0))
    assert m.on(failed(Stream.PREFILL, LOST)) == []
    assert m.on(decoded(1)) == [Emit(token(1))]
    assert m.on(DecodeDone(1, FINISHED)) == [Finish(FINISHED)]


def test_after_a_decode_worker_is_lost_the_next_goes_on_behind_what_has_left() -> None:
    m = split()
    m.on(prefilled())
    m.on(decoded(0))
    m.on(decoded(1))
    assert m.on(failed(Stream.DECODE, LOST)) == [CancelAttempt(1), ChooseRoute(frozenset({D}), 2)]
    assert m.on(decoded(2)) == [], "the attempt before is over"
    assert m.on(Routed(D2, P)) == [OpenDecode(2)]
    assert m.on(TicketCame(2, TICKET)) == [OpenPrefill(2, TICKET)]
    assert m.on(prefilled(attempt=2, id_=102)) == [Emit(token(2))]
    assert m.on(decoded(0, attempt=2, id_=102)) == []
    assert m.on(decoded(1, attempt=2, id_=103)) == [Emit(token(3))]
    m.on(PrefillDone(2, COMMITTED))
    assert m.on(DecodeDone(2, FINISHED)) == [Finish(FINISHED)]


def test_log_probabilities_come_with_their_tokens_also_when_an_answer_goes_on() -> None:
    m = split()
    m.on(decoded(0))
    m.on(failed(Stream.DECODE, LOST))
    m.on(Routed(D2, None))
    drawn = common_pb2.Token(
        index=0, id=101, logprob=-0.5, top_logprobs=[common_pb2.TokenLogprob(token_id=7, logprob=-0.25)]
    )
    sent = common_pb2.Token()
    sent.CopyFrom(drawn)
    sent.index = 1
    assert m.on(TokenCame(2, Stream.DECODE, drawn)) == [Emit(sent)]


def test_what_goes_wrong_while_it_decodes_is_held_against_the_decode_worker() -> None:
    m = split()
    m.on(decoded(0))
    assert m.on(failed(Stream.DECODE, AbortedError("x")))[1] == ChooseRoute(frozenset({D}), 1)


def test_where_nobody_can_go_on_the_lost_worker_is_named() -> None:
    m = split(max_attempts=1)
    m.on(decoded(0))
    m.on(failed(Stream.DECODE, LOST))
    fail = m.on(NotRouted(UnavailableError("nobody left")))[-1]
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, UnavailableError)
    assert fail.error.reason == "DECODE_WORKER_LOST"
    assert "d failed after 1 tokens" in fail.error.message


def test_an_answer_that_has_begun_goes_on_beyond_the_attempts_for_its_beginning_but_not_for_ever() -> None:
    m = split(max_attempts=1)
    m.on(decoded(0))
    for attempt in range(1, MOST_ATTEMPTS):
        assert isinstance(m.on(failed(Stream.DECODE, LOST, attempt))[-1], ChooseRoute)
        m.on(Routed(WorkerKey("d", attempt + 1), None))
    assert isinstance(m.on(failed(Stream.DECODE, LOST, MOST_ATTEMPTS))[-1], Fail)


@pytest.mark.parametrize(("num_tokens", "reason"), [(3, "LENGTH"), (2, "STOP")])
def test_a_worker_that_is_lost_after_the_last_token_is_not_missed(num_tokens: int, reason: str) -> None:
    m = RequestMachine(1, max_tokens=3, stop_ids=frozenset({101} if reason == "STOP" else ()))
    m.start()
    m.on(Routed(D, None))
    for index in range(num_tokens):
        m.on(decoded(index))
    finished = worker_pb2.DecodeFinished(reason=common_pb2.FinishReason.Value(f"FINISH_REASON_{reason}"))
    assert m.on(failed(Stream.DECODE, InvalidRequestError("x"))) == [CancelAttempt(1), Finish(finished)]


@given(st.data())
def test_whatever_is_lost_each_token_leaves_once_and_in_order(data: st.DataObject) -> None:
    """Workers draw by position; streams are cut anywhere, and events of attempts gone by still come."""
    num_tokens = data.draw(st.integers(1, 8))
    m = RequestMachine(50, max_tokens=num_tokens)
    num_lost = 0
    actions, sent, late = m.start(), [], []
    base = decode_at = 0  # tokens: that left before the attempt, that its decode worker has drawn
    has_writer = False
    for _ in range(300):
        for action in actions:
            match action:
                case Emit(token=emitted):
                    assert (emitted.index, emitted.id) == (len(sent), 100 + len(sent))
                    sent.append(emitted.id)
                case ChooseRoute(num_sent=num_sent):
                    assert num_sent == len(sent)
                    base, decode_at = num_sent, 0
                    has_writer = data.draw(st.booleans())
                case Finish():
                    assert len(sent) == num_tokens
                    return
                case Fail():
                    raise AssertionError(action)
        if isinstance(actions[-1] if actions else None, ChooseRoute):
            actions = m.on(Routed(WorkerKey("d", m.attempt), P if has_writer else None))
            continue
        kind = data.draw(st.sampled_from(["decode", "decode", "prefill", "lose", "late"]))
        if kind == "late" and late:
            actions = m.on(data.draw(st.sampled_from(late)))
        elif kind == "prefill" and has_writer:
            event = TokenCame(m.attempt, Stream.PREFILL, token(0, 100 + base))
            late.append(event)
            actions = m.on(event)
        elif kind == "lose" and num_lost < MOST_ATTEMPTS - 1:
            num_lost += 1
            actions = m.on(failed(Stream.DECODE, LOST, m.attempt))
        elif kind == "decode":
            if base + decode_at == num_tokens:
                m.on(PrefillDone(m.attempt, COMMITTED))
                actions = m.on(DecodeDone(m.attempt, FINISHED))
            else:
                event = decoded(decode_at, m.attempt, 100 + base + decode_at)
                decode_at += 1
                late.append(event)
                actions = m.on(event)
        else:
            actions = []


def test_attempts_are_bounded_and_the_first_cause_is_told() -> None:
    m = split(max_attempts=2)
    m.on(failed(Stream.PREFILL, LOST))
    m.on(Routed(D, WorkerKey("p2", 1)))
    again = UnavailableError("gone again")
    assert m.on(failed(Stream.PREFILL, again, attempt=2)) == [CancelAttempt(2), Fail(again)]
    m = split()
    m.on(failed(Stream.DECODE, LOST))
    assert m.on(NotRouted(UnavailableError("nobody left"))) == [CancelAttempt(2), Fail(LOST)]


def test_a_cause_without_a_hint_is_told_with_that_of_the_refusal() -> None:
    refusal = UnavailableError("over the budget", reason="RETRY_BUDGET", retry_after_s=2.0)
    for cause, hint in ((AbortedError("late", reason="R", metadata={"a": "b"}), 2.0),
                        (UnavailableError("gone", retry_after_s=0.5), 0.5)):  # fmt: skip
        machine = split()
        machine.on(failed(Stream.DECODE, cause))
        [*_, last] = machine.on(NotRouted(refusal))
        assert isinstance(last, Fail)
        assert type(last.error) is type(cause)
        assert (last.error.message, last.error.reason) == (cause.message, cause.reason)
        assert (last.error.metadata, last.error.retry_after_s) == (cause.metadata, hint)


def test_a_request_that_is_wrong_is_not_tried_twice() -> None:
    m = split()
    wrong = InvalidRequestError("wrong")
    assert m.on(failed(Stream.DECODE, wrong)) == [CancelAttempt(1), Fail(wrong)]


def test_workers_that_disagree_stop_the_answer() -> None:
    m = split()
    m.on(prefilled(id_=1))
    _, fail = m.on(decoded(0, id_=2))
    assert isinstance(fail, Fail)
    assert isinstance(fail.error, InternalError)


def test_a_gap_is_never_passed_on() -> None:
    m = split()
    _, fail = m.on(decoded(1))
    assert isinstance(fail, Fail)


def test_after_the_end_nothing_happens() -> None:
    m = split()
    m.on(failed(Stream.DECODE, InvalidRequestError("x")))
    for event in (decoded(0), prefilled(), DecodeDone(1, FINISHED), failed(Stream.DECODE, LOST)):
        assert m.on(event) == []
